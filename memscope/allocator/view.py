"""An allocator's memory as a trace tells of it: segments and blocks at the peak, and what could not be used, over time.

A trace knows no addresses. Those of a simulated run are had again by replaying it; whether that gave the same reserved
memory as the trace has is checked on the way. Needs neither CUDA nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from memscope.allocator.caching import CachingAllocator
from memscope.allocator.replay import follow
from memscope.allocator.report import AllocationFailed, HeldSegments
from memscope.allocator.settings import AllocatorSettings
from memscope.trace import Ints, Trace

__all__ = ["AllocatorView", "Segments", "allocator_view"]

SAMPLES = 600
"""Events that are looked at unless others are asked for."""


@dataclass(frozen=True)
class Segments:
    """Everything the allocator held at the peak of allocated memory."""

    snapshot: HeldSegments
    owners: Mapping[int, int]
    """Which allocation of the trace has the block at an address."""


@dataclass(frozen=True, eq=False)
class AllocatorView:
    """Columns have one value for each event looked at: int64 `[samples]`."""

    events: Ints
    requested: Ints
    allocated: Ints
    reserved: Ints
    unreleasable: Ints | None
    """Cached bytes that share a segment with something allocated: they fit nothing larger, and no other program has
    them. None where the segments are not known."""
    largest_free: Ints | None
    """Bytes of the largest cached block: what can be asked for without a new segment. None as above."""
    peak: Segments | None
    unknown: str = ""
    """Why the segments are not known, as a sentence; empty when they are."""

    @property
    def rounding(self) -> Ints:
        """Bytes by which blocks are larger than what was asked for."""
        return self.allocated - self.requested

    @property
    def cached(self) -> Ints:
        """Reserved and not allocated."""
        return self.reserved - self.allocated


def allocator_view(trace: Trace, events: Iterable[int] | None = None) -> AllocatorView | None:
    """What an allocator held through a run; None where there was none (a run on the CPU).

    Args:
        trace: of a simulated run, or of a measured one; of the latter the segments are not known.
        events: when to look; None: `SAMPLES` events evenly, and the peak.
    """
    if not trace.reserved.size:
        return None
    even = np.linspace(0, trace.events - 1, min(SAMPLES, trace.events)).astype(np.int64)
    at = np.union1d(even if events is None else np.fromiter(events, dtype=np.int64), [trace.peak.event])
    sums = at, _requested(trace)[at], trace.allocated[at], trace.reserved[at]
    if "allocator" not in trace.meta:
        return AllocatorView(*sums, None, None, None, _why_unknown(trace))
    try:
        return AllocatorView(*sums, *_replayed(trace, at))
    except (_OtherMemory, AllocationFailed):
        return AllocatorView(*sums, None, None, None, "a replay does not reserve what this trace says: no segments")


def _why_unknown(trace: Trace) -> str:
    match trace.meta.get("device"):
        case {"simulated": True}:
            return "this trace does not say how its allocator was set, so no segments are known: simulate it again"
        case {"simulated": False}:
            return "no addresses are kept of a measured run, so no segments are known"
    return "this trace says neither where its blocks lay nor how its allocator was set, so no segments are known"


class _OtherMemory(Exception):
    """A replay reserves other memory than the trace."""


def _replayed(trace: Trace, at: Ints) -> tuple[Ints, Ints, Segments]:
    """Unreleasable bytes and the largest free block at some events, and the segments at the peak."""
    allocator = _allocator(trace)
    at_peak = set(trace.at(trace.peak.event).tolist())
    owners: dict[int, int] = {}
    segments: Segments | None = None
    samples = dict.fromkeys(at.tolist(), (0, 0))
    emptied = trace.meta["allocator"]["cache_emptied"]
    turns = follow(allocator, trace.requested, trace.born, trace.freed, emptied)
    for event, (entry, block) in enumerate(turns):
        if block is not None and entry in at_peak:
            owners[block.address] = entry
        if event not in samples:
            continue
        if allocator.reserved != trace.reserved[event]:
            raise _OtherMemory
        samples[event] = allocator.unreleasable(), allocator.largest_free()
        if event == trace.peak.event:
            segments = Segments(allocator.snapshot(), dict(owners))
    assert segments is not None, "the peak is among the events"
    unreleasable, largest_free = np.array(list(samples.values()), dtype=np.int64).T
    return unreleasable, largest_free, segments


def _allocator(trace: Trace) -> CachingAllocator:
    """One as it was set up for the run: without limit where memory ran out, since the trace goes on all the same."""
    meta = trace.meta
    given = dict(meta["allocator"]["settings"])
    settings = AllocatorSettings(**given | {"roundup_power2_divisions": tuple(given["roundup_power2_divisions"])})
    if meta["capacity"] is None or meta["out_of_memory"]:
        return CachingAllocator(settings)
    return CachingAllocator(settings, meta["capacity"] - meta["context"], device_bytes=meta["capacity"])


def _requested(trace: Trace) -> Ints:
    """Bytes asked for of what is allocated, after each event: int64 `[events]`."""
    change = np.zeros(trace.events, dtype=np.int64)
    change[trace.born] = trace.requested
    died = trace.freed >= 0
    change[trace.freed[died]] = -trace.requested[died]
    return change.cumsum()
