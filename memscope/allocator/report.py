"""What the allocator reports: segments taken and given back, all that it holds at a moment, the request that failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from memscope.allocator.blocks import Block
from memscope.errors import OutOfDeviceMemory
from memscope.units import format_bytes

__all__ = ["AllocationFailed", "BlockState", "HeldSegments", "OutOfMemory", "Segment", "SegmentAction", "SegmentEvent"]

SegmentAction = Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]


@dataclass(frozen=True)
class SegmentEvent:
    """Memory taken from the driver or given back to it, as the traces of `torch.cuda.memory._snapshot()` list it."""

    event: int
    """Mallocs and frees before the one that caused it."""
    action: SegmentAction
    address: int
    size_bytes: int
    stream: int

    @property
    def change_bytes(self) -> int:
        """What it adds to the reserved memory; negative when memory is given back."""
        return self.size_bytes if self.action in ("segment_alloc", "segment_map") else -self.size_bytes


@dataclass(frozen=True)
class BlockState:
    """One block of a segment."""

    address: int
    size_bytes: int
    requested_bytes: int
    """Bytes it was asked for; 0 when it is cached."""
    allocated: bool


@dataclass(frozen=True)
class Segment:
    """Memory of the driver in one piece; of an expandable segment, a stretch that is mapped without a gap."""

    address: int
    size_bytes: int
    stream: int
    pool: Literal["small", "large"]
    expandable: bool
    releasable_bytes: int
    """Bytes torch.cuda.empty_cache() would give back: all of a segment that is not in use, or whole unused pages."""
    blocks: tuple[BlockState, ...]
    """Its blocks in order of address, without gaps."""


@dataclass(frozen=True)
class HeldSegments:
    """All segments at one moment, in order of address."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, heads: Iterable[Block]) -> HeldSegments:
        """The segments that begin with these blocks; an expandable one without memory anywhere is none."""
        return cls(tuple(_segment(stretch) for head in heads for stretch in _mapped_stretches(head)))

    @property
    def free_bytes(self) -> int:
        """Reserved and not allocated."""
        return sum(self._cached())

    @property
    def largest_free_bytes(self) -> int:
        """The largest cached block."""
        return max(self._cached(), default=0)

    @property
    def unreleasable_bytes(self) -> int:
        """Free bytes that cannot be given back, as they share a segment, or a page, with something allocated."""
        return self.free_bytes - sum(segment.releasable_bytes for segment in self.segments)

    def _cached(self) -> list[int]:
        return [block.size_bytes for segment in self.segments for block in segment.blocks if not block.allocated]


def _mapped_stretches(head: Block) -> Iterator[list[Block]]:
    stretch: list[Block] = []
    block: Block | None = head
    while block is not None:
        if block.mapped:
            stretch.append(block)
        elif stretch:
            yield stretch
            stretch = []
        block = block.next
    if stretch:
        yield stretch


def _segment(blocks: list[Block]) -> Segment:
    first = blocks[0]
    cached = [block for block in blocks if not block.allocated]
    if first.range is None:
        releasable = first.size if cached == blocks else 0
    else:
        releasable = sum(last - begin for begin, last in map(first.range.pages_within, cached))
    return Segment(
        address=first.address,
        size_bytes=sum(block.size for block in blocks),
        stream=first.pool.stream,
        pool="small" if first.pool.small else "large",
        expandable=first.range is not None,
        releasable_bytes=releasable,
        blocks=tuple(BlockState(b.address, b.size, b.requested if b.allocated else 0, b.allocated) for b in blocks),
    )


@dataclass(frozen=True)
class OutOfMemory:
    """A request that could not be met, and what there was after all that can be released had been."""

    event: int
    """Mallocs and frees before it."""
    requested_bytes: int
    segment_bytes: int
    """Bytes asked of the driver for it: "Tried to allocate" in PyTorch's message."""
    stream: int
    allocated_bytes: int
    reserved_bytes: int
    largest_free_bytes: int
    """The largest cached block, of any stream and pool."""
    limit_bytes: int
    """What may be reserved: the capacity, or less by `per_process_memory_fraction`."""

    @property
    def free_cached_bytes(self) -> int:
        """Reserved and not allocated."""
        return self.reserved_bytes - self.allocated_bytes

    def __str__(self) -> str:
        return (
            f"asking {format_bytes(self.requested_bytes)} with {format_bytes(self.reserved_bytes)} of "
            f"{format_bytes(self.limit_bytes)} taken: {format_bytes(self.allocated_bytes)} allocated, "
            f"{format_bytes(self.free_cached_bytes)} free in blocks of at most {format_bytes(self.largest_free_bytes)}"
        )


class AllocationFailed(OutOfDeviceMemory):
    """The allocator could not meet a request; `record` says which, and what there was."""

    def __init__(self, record: OutOfMemory) -> None:
        super().__init__(f"out of device memory, {record}")
        self.record = record
