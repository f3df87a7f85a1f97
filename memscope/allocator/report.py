"""The allocator's reports: segments reserved and released, segments held at a moment, and the request that failed."""

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
    """Driver memory reserved or released, as listed in the traces of `torch.cuda.memory._snapshot()`."""

    event: int
    """Number of mallocs and frees before the one that caused it."""
    action: SegmentAction
    address: int
    size_bytes: int
    stream: int

    @property
    def change_bytes(self) -> int:
        """Change of reserved memory; negative if memory is released."""
        return self.size_bytes if self.action in ("segment_alloc", "segment_map") else -self.size_bytes


@dataclass(frozen=True)
class BlockState:
    """One block of a segment."""

    address: int
    size_bytes: int
    requested_bytes: int
    """Bytes requested; 0 for a cached block."""
    allocated: bool


@dataclass(frozen=True)
class Segment:
    """One contiguous piece of driver memory; of an expandable segment, a range that is mapped without gaps."""

    address: int
    size_bytes: int
    stream: int
    pool: Literal["small", "large"]
    expandable: bool
    releasable_bytes: int
    """Bytes that torch.cuda.empty_cache() would release: a whole unused segment, or whole unused pages."""
    blocks: tuple[BlockState, ...]
    """The segment's blocks in order of address, without gaps."""


@dataclass(frozen=True)
class HeldSegments:
    """All segments at one moment, in order of address."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, heads: Iterable[Block]) -> HeldSegments:
        """The segments that begin with these blocks; expandable segments without mapped memory are left out."""
        return cls(tuple(_segment(stretch) for head in heads for stretch in _mapped_stretches(head)))

    @property
    def free_bytes(self) -> int:
        """Bytes reserved but not allocated."""
        return sum(self._cached())

    @property
    def largest_free_bytes(self) -> int:
        """Bytes of the largest cached block."""
        return max(self._cached(), default=0)

    @property
    def unreleasable_bytes(self) -> int:
        """Free bytes that cannot be released: they share a segment or a page with an allocated block."""
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
    """A request that failed, and the memory in use after everything releasable had been released."""

    event: int
    """Number of mallocs and frees before it."""
    requested_bytes: int
    segment_bytes: int
    """Bytes requested from the driver for it: "Tried to allocate" in PyTorch's message."""
    stream: int
    allocated_bytes: int
    reserved_bytes: int
    largest_free_bytes: int
    """Bytes of the largest cached block, of any stream and pool."""
    limit_bytes: int
    """Bytes that may be reserved: the capacity, or less if `per_process_memory_fraction` is set."""

    @property
    def free_cached_bytes(self) -> int:
        """Bytes reserved but not allocated."""
        return self.reserved_bytes - self.allocated_bytes

    def __str__(self) -> str:
        return (
            f"while allocating {format_bytes(self.requested_bytes)} ({format_bytes(self.reserved_bytes)} of "
            f"{format_bytes(self.limit_bytes)} reserved: {format_bytes(self.allocated_bytes)} allocated, "
            f"{format_bytes(self.free_cached_bytes)} free in blocks of at most {format_bytes(self.largest_free_bytes)})"
        )


class AllocationFailed(OutOfDeviceMemory):
    """The allocator ran out of memory; `record` describes the request and the memory in use."""

    def __init__(self, record: OutOfMemory) -> None:
        super().__init__(f"out of device memory {record}")
        self.record = record
