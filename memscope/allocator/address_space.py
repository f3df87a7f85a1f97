"""Where the segments of an allocator lie: the first block of each, by its address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memscope.allocator.blocks import AddressRange, Block, Pool

__all__ = ["AddressSpace"]

_FIRST_ADDRESS = 1 << 60  # above any address of a driver


class AddressSpace:
    """The segments of one device. Each new one lies above those before it, unless the driver's address is known."""

    def __init__(self, known: Mapping[int, int]) -> None:
        """Begin without segments.

        Args:
            known: the driver's address of the segment created in each event, by event.
        """
        self._known = known
        self._next = _FIRST_ADDRESS
        self._heads: dict[int, Block] = {}
        self._ends: dict[int, int] = {}  # end of each segment, by its address

    def heads(self) -> Iterator[Block]:
        """The first block of each segment, in the order of their addresses."""
        return (head for _, head in sorted(self._heads.items()))

    def add(self, pool: Pool, size: int, page: int | None) -> Block:
        """A new segment, as one block in no pool; with pages (of an expandable segment), none of them is mapped yet."""
        address = self._next
        self._next += size
        within = None if page is None else AddressRange(address, size, page)
        block = self._heads[address] = Block(address, size, pool, within, mapped=page is None)
        self._ends[address] = address + size
        return block

    def place(self, head: Block, event: int) -> None:
        """Move a segment, which is one block in no pool, to the driver's address of the segment made in an event.

        It stays where it is if the address is not known, or another segment lies there.
        """
        address = self._known.get(event)
        if address is None:
            return
        end = address + head.size
        if not any(start < end and address < stop for start, stop in self._ends.items()):
            self._heads[address] = self._heads.pop(head.address)
            del self._ends[head.address]
            self._ends[address] = end
            head.address = address
            if head.range is not None:
                head.range.base = address

    def remove(self, head: Block) -> None:
        """Forget a segment."""
        del self._heads[head.address], self._ends[head.address]
