"""Replay of a run's allocations through PyTorch's CUDA caching allocator: what is reserved, where it breaks up, when it ends.

Which allocations are made, and in what order, comes from a trace; here they get the blocks, segments and addresses that they
would get on a device of a given capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from memscope.simulation.allocator_blocks import Block
from memscope.simulation.allocator_settings import AllocatorSettings
from memscope.simulation.caching_allocator import (
    AllocationFailed,
    CachingAllocator,
    OutOfMemory,
    SegmentEvent,
)

__all__ = [
    "AllocationFailed",
    "AllocatorSettings",
    "CachingAllocator",
    "OutOfMemory",
    "Replay",
    "Segment",
    "SegmentEvent",
    "Snapshot",
    "replay",
    "snapshot",
]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """Memory held from the driver in one piece; of an expandable segment, each stretch that is mapped without a gap."""

    address: int
    size_bytes: int
    stream: int
    pool: Literal["small", "large"]
    expandable: bool
    blocks: tuple[tuple[int, int, bool], ...]
    """(address, bytes, allocated), in order of address and without gaps."""


@dataclass(frozen=True)
class Snapshot:
    """All segments at one moment, in order of address."""

    segments: tuple[Segment, ...]

    @property
    def largest_free_bytes(self) -> int:
        """The largest cached block: the largest request that any stream or pool could meet without the driver."""
        return max((size for s in self.segments for _, size, allocated in s.blocks if not allocated), default=0)

    @property
    def free_bytes(self) -> int:
        """Reserved and not allocated."""
        return sum(size for s in self.segments for _, size, allocated in s.blocks if not allocated)

    @property
    def unreleasable_bytes(self) -> int:
        """Free bytes that share their segment, or their page of an expandable one, with something allocated."""
        raise NotImplementedError


def snapshot(allocator: CachingAllocator) -> Snapshot:
    """What the allocator holds now, as torch.cuda.memory_snapshot() lists it."""
    found = []
    for blocks in allocator.segments():
        for stretch in _mapped_stretches(blocks):
            first = stretch[0]
            found.append(
                Segment(
                    address=first.address,
                    size_bytes=sum(block.size for block in stretch),
                    stream=first.pool.stream,
                    pool="small" if first.pool.small else "large",
                    expandable=first.range is not None,
                    blocks=tuple((block.address, block.size, block.allocated) for block in stretch),
                )
            )
    return Snapshot(tuple(found))


def _mapped_stretches(blocks: list[Block]) -> Iterator[list[Block]]:
    stretch: list[Block] = []
    for block in blocks:
        if block.mapped:
            stretch.append(block)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch
