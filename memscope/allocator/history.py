"""Read the history of PyTorch's own allocator from a snapshot, and find the first event where a replay differs from it.

A history is one of the lists in `torch.cuda.memory._snapshot()["device_traces"]`, recorded from before the first
allocation on the device. Source of its entries: TraceEntry in c10/core/CachingDeviceAllocator.h, PyTorch 2.13.0.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from memscope.allocator.replay import Replay
from memscope.allocator.report import SegmentEvent
from memscope.errors import TraceFileError
from memscope.trace import Ints

__all__ = ["History", "first_difference", "read_history"]

_SEGMENT_ACTIONS = frozenset({"segment_alloc", "segment_free", "segment_map", "segment_unmap"})


@dataclass(frozen=True, eq=False)
class History:
    """Allocations of a real run and their addresses, in the columns that `replay` takes: int64 `[allocations]`.

    A request that ran out of memory ends the history. It is the last allocation, with the size of the block it needed.
    """

    sizes: Ints
    """Bytes requested."""
    born: Ints
    freed: Ints
    """Event at which the block became reusable, -1 for never; after `Tensor.record_stream`, later than the free."""
    streams: Ints
    addresses: Ints
    """Address of the block; -1 for the request that ran out of memory."""
    segment_events: tuple[SegmentEvent, ...]
    """Driver memory reserved and released."""

    @property
    def cache_emptied(self) -> tuple[int, ...]:
        """Events before which memory was released but none reserved: torch.cuda.empty_cache() was called."""
        taken = {event.event for event in self.segment_events if event.change_bytes > 0}
        return tuple(event for event in self.given_back if event not in taken)

    @property
    def given_back(self) -> tuple[int, ...]:
        """Events before which memory was released, by torch.cuda.empty_cache() or because the limit was reached.

        To replay a run whose limit is unknown, pass these as `cache_emptied`. The result is the same, because at the
        limit no cached memory could be used. With `max_split_size_mb` or `garbage_collection_threshold` it is not the
        same: these release less.
        """
        failed = set(self.born[self.addresses < 0].tolist())
        return tuple(sorted({event.event for event in self.segment_events if event.change_bytes < 0} - failed))

    @property
    def segment_addresses(self) -> dict[int, int]:
        """Address of the segment created in each event, by event: for `replay`, to follow PyTorch 2.11 and older."""
        # An event may first have mapped pages of other segments, in vain: the last address is the new segment's.
        return {event.event: event.address for event in self.segment_events if event.change_bytes > 0}


def read_history(entries: Iterable[Mapping[str, Any]]) -> History:
    """Sort the entries of one device's trace into allocations and segments, up to the first out-of-memory error.

    Raises:
        TraceFileError: the history began after the first allocation, or its oldest entries were dropped.
    """
    sizes: list[int] = []
    born: list[int] = []
    freed: list[int] = []
    streams: list[int] = []
    addresses: list[int] = []
    segment_events: list[SegmentEvent] = []
    alive: dict[int, int] = {}
    events = 0
    for entry in entries:
        action, size, stream = entry["action"], entry["size"], entry["stream"]
        address = -1 if action == "oom" else entry["addr"]  # an `oom` entry has `device_free` instead
        if action in _SEGMENT_ACTIONS:
            segment_events.append(SegmentEvent(events, action, address, size, stream))
        elif action in ("alloc", "oom"):
            if not segment_events:
                raise _truncated("its first allocation needed no segment")
            alive[address] = len(sizes)
            sizes.append(size)
            born.append(events)
            freed.append(-1)
            streams.append(stream)
            addresses.append(address)
            if action == "oom":
                break
            events += 1
        elif action == "free_completed":
            if address not in alive:
                raise _truncated(f"it frees the block at {address:#x}, which it did not allocate")
            freed[alive.pop(address)] = events
            events += 1
    return History(
        sizes=np.array(sizes, dtype=np.int64),
        born=np.array(born, dtype=np.int64),
        freed=np.array(freed, dtype=np.int64),
        streams=np.array(streams, dtype=np.int64),
        addresses=np.array(addresses, dtype=np.int64),
        segment_events=tuple(segment_events),
    )


def _truncated(because: str) -> TraceFileError:
    return TraceFileError(
        f"the allocator history does not go back to the first allocation: {because}. Call "
        "torch.cuda.memory._record_memory_history before anything is put on the device, with a larger max_entries"
    )


def first_difference(history: History, replay: Replay) -> str | None:
    """The first difference between a replay and PyTorch's history, as a sentence; None if they agree to the byte.

    They agree if each event reserves and releases the same segments, and each block lies at the same place in its
    segment. The addresses of the segments themselves are up to the driver.
    """
    places = _Places()
    found = _compare_segments(history.segment_events, replay.segment_events, places)
    for born, ours, theirs in zip(history.born, replay.addresses.tolist(), history.addresses.tolist(), strict=True):
        if found is not None and born > found[0]:
            break
        if (ours < 0) != (theirs < 0):
            full, other = ("PyTorch", "the replay") if theirs < 0 else ("the replay", "PyTorch")
            return f"event {born}: {full} ran out of memory, {other} did not"
        if found is not None and born == found[0]:
            break
        if ours >= 0 and theirs != places.of(ours):
            return f"event {born}: PyTorch used the block at {theirs:#x}, the replay the block at {places.of(ours):#x}"
    return None if found is None else f"event {found[0]}: {found[1]}"


class _Places:
    """Translates addresses of a replay into addresses of the real run."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._shifts: dict[int, int] = {}

    def add(self, ours: int, theirs: int) -> None:
        insort(self._starts, ours)
        self._shifts[ours] = theirs - ours

    def of(self, ours: int) -> int:
        return ours + self._shifts[self._starts[bisect_right(self._starts, ours) - 1]]


def _compare_segments(
    theirs: tuple[SegmentEvent, ...], ours: tuple[SegmentEvent, ...], places: _Places
) -> tuple[int, str] | None:
    """Event and description of the first difference; adds the segments' addresses to `places`."""
    for their, our in zip_longest(theirs, ours):
        if their is None or our is None or (their.event, _told(their)) != (our.event, _told(our)):
            event = min(change.event for change in (their, our) if change is not None)
            return event, f"PyTorch did {_told(their)}, the replay {_told(our)}"
        if our.change_bytes > 0:
            places.add(our.address, their.address)
        elif their.address != places.of(our.address):
            return our.event, f"PyTorch released {their.address:#x}, the replay {places.of(our.address):#x}"
    return None


def _told(change: SegmentEvent | None) -> str:
    return "nothing" if change is None else f"a {change.action} of {change.size_bytes} bytes on stream {change.stream}"
