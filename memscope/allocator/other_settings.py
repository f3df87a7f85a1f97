"""Settings of PyTorch's allocator with which a run would need less reserved memory, found by replaying it with each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from memscope.allocator.replay import replay
from memscope.allocator.settings import LARGE_SEGMENT, MIB, AllocatorSettings
from memscope.allocator.traced import cache_emptied_in, settings_of
from memscope.errors import UsageError
from memscope.trace import Trace

__all__ = ["WORTH_SAYING", "OtherSetting", "helpful_settings", "other_settings"]

WORTH_SAYING = 0.02
"""Savings below this share of the reserved bytes are not mentioned."""
_MAX_SPLIT_MIB = (64, 128, 256, 512)


@dataclass(frozen=True)
class OtherSetting:
    """A setting that was not the run's own."""

    text: str
    """As `PYTORCH_CUDA_ALLOC_CONF` takes it; the run's other settings stay."""
    reserved_bytes: int
    """Peak reserved bytes of the run with it."""


def other_settings(
    trace: Trace, settings: AllocatorSettings, capacity_bytes: int | None, device_bytes: int | None = None
) -> tuple[OtherSetting, ...]:
    """The settings with which a run completes within a capacity, the least reserved bytes first.

    Args:
        trace: a simulated run.
        settings: those of the run.
        capacity_bytes: bytes that the driver can give; None: no limit.
        device_bytes: see `CachingAllocator`.
    """
    found = []
    for text, tried in _candidates(settings):
        run = replay(
            trace.requested,
            trace.born,
            trace.freed,
            settings=tried,
            capacity_bytes=capacity_bytes,
            device_bytes=device_bytes,
            cache_emptied=cache_emptied_in(trace),
        )
        if run.oom is None:
            found.append(OtherSetting(text, run.peak_reserved))
    return tuple(sorted(found, key=lambda one: one.reserved_bytes))


def helpful_settings(trace: Trace) -> tuple[OtherSetting, ...]:
    """The settings that would help a simulated run, the best first; none for a measured run.

    A run that does not fit is helped by the settings with which it fits; any other by those that save at least 2 % of
    its reserved bytes, and a segment.
    """
    if "allocator" not in trace.meta or not trace.reserved.size:
        return ()
    reserved, capacity = trace.meta["peak_reserved"], trace.meta["capacity"]
    available = None if capacity is None else capacity - trace.meta["context"]
    allocated = trace.peak.allocated_bytes
    if trace.meta["out_of_memory"]:
        most = available
        if available is None or allocated > available:
            return ()
    else:
        most = min(int((1 - WORTH_SAYING) * reserved), reserved - LARGE_SEGMENT)
        if allocated > most:
            return ()
    try:
        found = other_settings(trace, settings_of(trace), available, capacity)
    except UsageError:  # written by a memscope that knew settings that this one refuses
        return ()
    return tuple(one for one in found if most is None or one.reserved_bytes <= most)


def _candidates(settings: AllocatorSettings) -> Iterator[tuple[str, AllocatorSettings]]:
    if not settings.expandable_segments:
        yield "expandable_segments:True", dataclasses.replace(settings, expandable_segments=True)
        for size in _MAX_SPLIT_MIB:
            limit = size * MIB
            if limit > settings.large_segment_size_bytes and limit != settings.max_split_size_bytes:
                yield f"max_split_size_mb:{size}", dataclasses.replace(settings, max_split_size_bytes=limit)
