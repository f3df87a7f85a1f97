"""The allocator's data structures: blocks, pools of cached blocks, and address ranges of expandable segments.

Source: structs Block, BlockPool and ExpandableSegment of c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.13.0.
"""

from __future__ import annotations

from bisect import bisect_left, insort

__all__ = ["AddressRange", "Block", "Pool"]


class AddressRange:
    """Addresses reserved for one expandable segment; memory is mapped to them page by page.

    Args:
        base: first address.
        size: bytes, a multiple of `page`.
        page: bytes mapped and unmapped at a time.
    """

    __slots__ = ("base", "page", "size")

    def __init__(self, base: int, size: int, page: int) -> None:
        self.base, self.size, self.page = base, size, page

    def pages_within(self, block: Block) -> tuple[int, int]:
        """Start and end address of the whole pages inside a block; both are equal if the block has no whole page."""
        first = block.address + (self.base - block.address) % self.page
        end = block.address + block.size
        last = end - (end - self.base) % self.page
        return first, max(first, last)


class Block:
    """A contiguous range of device memory, as returned by `CachingAllocator.malloc`. Only the allocator changes it."""

    __slots__ = (
        "address", "age", "allocated", "gc_base", "mapped", "next", "pool", "previous", "range", "requested", "size",
    )  # fmt: skip

    def __init__(
        self, address: int, size: int, pool: Pool, within: AddressRange | None, *, mapped: bool = True
    ) -> None:
        self.address = address
        self.age = 0  # number of the block, in order of creation; decides among equal cached blocks in 2.12
        self.size = size
        self.pool = pool
        self.range = within
        self.mapped = mapped
        self.allocated = False
        self.requested = 0
        self.gc_base = 0
        self.previous: Block | None = None
        self.next: Block | None = None

    def cut(self, size: int) -> Block:
        """Keep the first `size` bytes, and return the rest as a new block, the next neighbour."""
        rest = Block(self.address + size, self.size - size, self.pool, self.range, mapped=self.mapped)
        self.size = size
        rest.previous, rest.next = self, self.next
        if self.next is not None:
            self.next.previous = rest
        self.next = rest
        return rest

    def absorb_next(self) -> None:
        """Merge with the next neighbour, which ceases to exist."""
        after = self.next
        assert after is not None
        self.size += after.size
        self.next = after.next
        if after.next is not None:
            after.next.previous = self

    def room(self, size: int) -> bool:
        """Whether `size` bytes from the start of this block are free, mapped or unmapped."""
        found, block = 0, self
        while not block.allocated:
            found += block.size
            if found >= size:
                return True
            if block.next is None:
                break
            block = block.next
        return False

    @property
    def unreleasable(self) -> int:
        """Bytes of a cached block that cannot be released: they share a segment or a page with an allocated block."""
        if self.range is None:
            return 0 if self.previous is None and self.next is None else self.size
        first, last = self.range.pages_within(self)
        return self.size - (last - first)

    @property
    def extent(self) -> int:
        """Bytes of the block, plus those of the unmapped range behind it, which it could grow into."""
        after = self.next
        return self.size if after is None or after.mapped else self.size + after.size


class Pool:
    """The free blocks of one stream, small or large.

    PyTorch keeps the blocks of all streams in one std::set, sorted by stream first; here each stream has its own pool.
    """

    __slots__ = ("by_age", "cached", "small", "stream", "unmapped")

    def __init__(self, *, small: bool, stream: int, by_age: bool = False) -> None:
        self.small = small
        self.stream = stream
        self.by_age = by_age
        """Whether cached blocks of equal size are sorted by age, not by address."""
        self.cached: list[tuple[int, int, Block]] = []
        """(size, address or age, block) in ascending order: the first block that is large enough is the best fit."""
        self.unmapped: list[tuple[int, Block]] = []
        """(address, block) of the unmapped ranges of expandable segments, in ascending order."""

    def add(self, block: Block) -> None:
        """Add a free block."""
        if block.mapped:
            insort(self.cached, (block.size, block.age if self.by_age else block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: Block) -> None:
        """Remove a block, before it is allocated, changed or released."""
        if block.mapped:
            del self.cached[bisect_left(self.cached, (block.size, block.age if self.by_age else block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]
