"""The allocator's view of a trace: segments and blocks at the peak, and unusable memory over time.

A trace has no addresses. Replaying a simulated run restores them; the replay is checked against the trace's reserved
memory. Needs neither CUDA nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from memscope.allocator.caching import CachingAllocator
from memscope.allocator.replay import follow
from memscope.allocator.report import AllocationFailed, HeldSegments
from memscope.allocator.traced import cache_emptied_in, settings_of
from memscope.errors import UsageError
from memscope.trace import Ints, Trace

__all__ = ["AllocatorView", "Segments", "allocator_view"]

SAMPLES = 600
"""Default number of sampled events."""


@dataclass(frozen=True)
class Segments:
    """All segments of the allocator at the peak of allocated memory."""

    snapshot: HeldSegments
    owners: Mapping[int, int]
    """Address of a block → index of its allocation in the trace."""


@dataclass(frozen=True, eq=False)
class AllocatorView:
    """The allocator's memory at sampled events. Columns are int64 `[samples]`."""

    events: Ints
    requested: Ints
    allocated: Ints
    reserved: Ints
    unreleasable: Ints | None
    """Cached bytes that cannot be released, because they share a segment or a page with an allocated block. None if the
    segments are not known."""
    largest_free: Ints | None
    """Bytes of the largest cached block: the largest request that needs no new segment. None as above."""
    peak: Segments | None
    unknown: str = ""
    """Why the segments are not known, as a sentence; empty if they are known."""

    @property
    def rounding(self) -> Ints:
        """Bytes by which blocks exceed the bytes requested."""
        return self.allocated - self.requested

    @property
    def cached(self) -> Ints:
        """Bytes reserved but not allocated."""
        return self.reserved - self.allocated


def allocator_view(trace: Trace, events: Iterable[int] | None = None) -> AllocatorView | None:
    """The allocator's memory over a run; None for a run without an allocator (on the CPU).

    Args:
        trace: a simulated or measured run. The segments of a measured run are not known.
        events: the events to sample, besides the peak; None: `SAMPLES` evenly spaced events.
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
        reason = "a replay reserves other memory than this trace, so its segments are not known"
    except UsageError as error:
        reason = f"{error}: its segments are not known"
    return AllocatorView(*sums, None, None, None, reason)


def _why_unknown(trace: Trace) -> str:
    match trace.meta.get("device"):
        case {"simulated": True}:
            return "this trace has no allocator settings, so its segments are not known: simulate it again"
        case {"simulated": False}:
            return "the trace of a measured run has no addresses, so its segments are not known"
    return "this trace has neither addresses nor allocator settings, so its segments are not known"


class _OtherMemory(Exception):
    """The replay's reserved memory differs from the trace's."""


def _replayed(trace: Trace, at: Ints) -> tuple[Ints, Ints, Segments]:
    """Unreleasable bytes and the largest free block at some events, and the segments at the peak."""
    allocator = _allocator(trace)
    at_peak = set(trace.at(trace.peak.event).tolist())
    owners: dict[int, int] = {}
    segments: Segments | None = None
    samples = dict.fromkeys(at.tolist(), (0, 0))
    turns = follow(allocator, trace.requested, trace.born, trace.freed, cache_emptied_in(trace))
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
    """The run's allocator; without a limit if the run ran out of memory, because the simulation then continues."""
    meta = trace.meta
    settings = settings_of(trace)
    if meta["capacity"] is None or meta["out_of_memory"]:
        return CachingAllocator(settings)
    return CachingAllocator(settings, meta["capacity"] - meta["context"], device_bytes=meta["capacity"])


def _requested(trace: Trace) -> Ints:
    """Bytes requested for the allocations alive after each event: int64 `[events]`."""
    change = np.zeros(trace.events, dtype=np.int64)
    change[trace.born] = trace.requested
    died = trace.freed >= 0
    change[trace.freed[died]] = -trace.requested[died]
    return change.cumsum()
