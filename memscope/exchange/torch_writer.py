"""Traces as memory snapshots that PyTorch's own viewer opens: `memscope export --to torch-snapshot`.

A trace holds no addresses. Addresses and segments come from a replay of PyTorch's allocator with the same requests: for
a simulated trace they are its own, for any other trace they are one possible outcome.

Layout: torch/cuda/memory.py (`_snapshot`), PyTorch 2.13; read by torch/cuda/_memory_viz.py and torch/utils/viz/
MemoryViz.js (2.6 to 2.13), whose own unpickler knows protocols 2 to 4.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from memscope.allocator.replay import Replay, replay
from memscope.allocator.report import Segment, SegmentEvent
from memscope.errors import UsageError
from memscope.exchange.own_snapshot import OwnFrames, about_run
from memscope.trace import CATEGORIES, Progress, Trace, no_progress

__all__ = ["torch_snapshot", "torch_snapshot_bytes"]

_PROTOCOL = 4
_TELL_EVERY = 100_000


def torch_snapshot_bytes(trace: Trace, progress: Progress = no_progress) -> bytes:
    """Return the file of a trace's snapshot, a pickle of plain data."""
    return pickle.dumps(torch_snapshot(trace, progress), protocol=_PROTOCOL)


def torch_snapshot(trace: Trace, progress: Progress = no_progress) -> dict[str, Any]:
    """Return what `torch.cuda.memory._snapshot()` would have returned at the end of a run with recorded history.

    Raises:
        UsageError: the trace has more memory at once than a device has addresses.
    """
    progress("replaying the allocator", 0, 1)
    run = replay(trace.requested, trace.born, trace.freed)
    if run.oom:
        raise UsageError(f"the trace has more memory at once than addresses: its replay runs out {run.oom}")
    frames = OwnFrames(trace)
    entries = list(_entries(trace, run, frames, progress))
    return {
        "segments": list(_segments(trace, run, frames)),
        "device_traces": [entries],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": ""},
        "external_annotations": [],
        **about_run(trace, run.reserved),
    }


def _entries(trace: Trace, run: Replay, frames: OwnFrames, progress: Progress) -> Iterator[dict[str, Any]]:
    # One entry has the category "unknown": else MemoryViz.js would add it to a list whose name it misspells.
    yield _entry("snapshot", 0, 0, 0, [], category="unknown")
    row_of = dict(zip(trace.born.tolist(), range(len(trace)), strict=True))
    freed_row = {int(trace.freed[row]): row for row in range(len(trace)) if trace.freed[row] >= 0}
    marks, changes = _by_event(trace.mark_event.tolist()), _by_event([e.event for e in run.segment_events])
    for event in range(trace.events + 1):
        if event % _TELL_EVERY == 0:
            progress("writing", event, trace.events)
        for mark in marks.get(event, ()):
            yield _entry("snapshot", 0, 0, event, frames.of_mark(mark))
        for change in changes.get(event, ()):
            yield _segment_entry(run.segment_events[change])
        if event in row_of:
            yield from _birth(trace, run, frames, row_of[event])
        elif event in freed_row:
            yield from _death(trace, run, frames, freed_row[event])


def _birth(trace: Trace, run: Replay, frames: OwnFrames, row: int) -> Iterator[dict[str, Any]]:
    event, address, size = int(trace.born[row]), int(run.addresses[row]), int(trace.requested[row])
    if not size:
        yield _entry("snapshot", 0, 0, event, frames.of_empty(row, freed=False))
        return
    category = CATEGORIES[int(trace.category[row])]
    yield _entry("alloc", address, size, event, frames.of_allocation(row), category=category)


def _death(trace: Trace, run: Replay, frames: OwnFrames, row: int) -> Iterator[dict[str, Any]]:
    event, address, size = int(trace.freed[row]), int(run.addresses[row]), int(trace.requested[row])
    if not size:
        yield _entry("snapshot", 0, 0, event, frames.of_empty(row, freed=True))
        return
    for action in ("free_requested", "free_completed"):
        yield _entry(action, address, size, event, frames.of_allocation(row))


def _segment_entry(change: SegmentEvent) -> dict[str, Any]:
    return _entry(change.action, change.address, change.size_bytes, change.event, [])


def _entry(
    action: str, address: int, size_bytes: int, event: int, frames: list[dict[str, Any]], **more: str
) -> dict[str, Any]:
    """An entry of the history; its clock counts events, like a trace's."""
    about = {"action": action, "addr": address, "size": size_bytes, "stream": 0, "time_us": event, "frames": frames}
    return {**about, "compile_context": "N/A", "user_metadata": "", **more}


def _by_event(events: list[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, event in enumerate(events):
        found.setdefault(event, []).append(place)
    return found


def _segments(trace: Trace, run: Replay, frames: OwnFrames) -> Iterator[dict[str, Any]]:
    if not trace.events:
        return
    alive = {int(run.addresses[row]): row for row in range(len(trace)) if trace.freed[row] < 0}
    for segment in run.snapshots([trace.events - 1])[trace.events - 1].segments:
        yield _segment(segment, alive, frames)


def _segment(segment: Segment, alive: dict[int, int], frames: OwnFrames) -> dict[str, Any]:
    allocated = sum(block.size_bytes for block in segment.blocks if block.allocated)
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size_bytes,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(block.requested_bytes for block in segment.blocks),
        "stream": segment.stream,
        "segment_type": segment.pool,
        "segment_pool_id": (0, 0),
        "is_expandable": segment.expandable,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size_bytes,
                "requested_size": block.requested_bytes,
                "state": "active_allocated" if block.allocated else "inactive",
                "frames": frames.of_allocation(alive[block.address]) if block.allocated else [],
            }
            for block in segment.blocks
        ],
    }
