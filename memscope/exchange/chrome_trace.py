"""Traces in Chrome's Trace Event Format, which Perfetto also opens: `memscope export --to perfetto` or `chrome`.

The format's clock counts events: one microsecond is the birth or death of one allocation. A file holds a track of steps
and phases; counters of allocated bytes, reserved bytes and the bytes of each category; and the largest allocations as
slices, with the name of their operator and their category. Source: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from memscope.trace import CATEGORIES, PHASES, Ints, Progress, Trace, no_progress

__all__ = ["MOST_SLICES", "chrome_trace_bytes"]

MOST_SLICES = 100_000
"""Number of allocations shown as slices, the largest ones. Viewers are unusable with many more. Counters cover all."""
_PROCESS, _COURSE, _ALLOCATIONS = 1, 1, 2
"""Ids of the one process and its threads: one for steps and phases, one for allocations."""
Event = Mapping[str, Any]


def chrome_trace_bytes(trace: Trace, progress: Progress = no_progress) -> bytes:
    """Return the file: one JSON object, with the events in `traceEvents`."""
    file = io.BytesIO()
    about = {"memscope": {"target": trace.meta.get("target"), "inferred": trace.meta.get("inferred", [])}}
    file.write(b'{"displayTimeUnit":"ms","otherData":' + _line(about) + b',"traceEvents":[\n')
    parts: list[tuple[str, Callable[[Trace], Iterator[Event]]]] = [
        ("names", _names),
        ("steps and phases", _course),
        ("counters", _counters),
        ("allocations", _slices),
    ]
    separator = b""
    for done, (name, events) in enumerate(parts):
        progress(f"writing {name}", done, len(parts))
        for event in events(trace):
            file.write(separator + _line(event))
            separator = b",\n"
    file.write(b"\n]}\n")
    return file.getvalue()


def _line(value: Event) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _names(trace: Trace) -> Iterator[Event]:
    process = f"memory of {trace.meta.get('target', 'a run')}"
    yield {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": process}}
    for thread, name in ((_COURSE, "steps and phases"), (_ALLOCATIONS, "allocations")):
        yield {"ph": "M", "pid": _PROCESS, "tid": thread, "name": "thread_name", "args": {"name": name}}


def _course(trace: Trace) -> Iterator[Event]:
    """Slices of the steps, and of the phases within them."""
    for step in trace.steps:
        first, last = trace.step_range(step)
        yield _stretch(f"step {step}", first, last, {})
    ends = [*trace.mark_event[1:].tolist(), trace.events]
    columns = (trace.mark_event, trace.mark_phase, trace.mark_step, trace.mark_micro_batch)
    for (first, phase, step, micro_batch), last in zip(
        zip(*(c.tolist() for c in columns), strict=True), ends, strict=True
    ):
        yield _stretch(PHASES[phase], first, last, {"step": step, "micro_batch": micro_batch})


def _stretch(name: str, first: int, last: int, about: Mapping[str, Any]) -> Event:
    return {
        "ph": "X", "pid": _PROCESS, "tid": _COURSE, "name": name, "ts": first, "dur": last - first, "args": about
    }  # fmt: skip


def _counters(trace: Trace) -> Iterator[Event]:
    if not trace.events:
        return
    yield from _counter("allocated", trace.allocated)
    if trace.reserved.size:
        yield from _counter("reserved", trace.reserved)
    for code in np.unique(trace.category).tolist():
        yield from _counter(CATEGORIES[code], trace.timeline(CATEGORIES[code]))


def _counter(name: str, sizes: Ints) -> Iterator[Event]:
    """A counter's value at each change and at the end, because viewers draw only up to the last value."""
    changes = np.flatnonzero(np.diff(sizes, prepend=0)).tolist()
    for event in changes if changes[-1:] == [len(sizes) - 1] else [*changes, len(sizes) - 1]:
        yield {"ph": "C", "pid": _PROCESS, "name": name, "ts": event, "args": {"bytes": int(sizes[event])}}


def _slices(trace: Trace) -> Iterator[Event]:
    largest = np.sort(np.argsort(-trace.size, kind="stable")[:MOST_SLICES])
    for row in largest.tolist():
        category, op = CATEGORIES[int(trace.category[row])], trace.ops[int(trace.op[row])]
        freed = int(trace.freed[row])
        shared = {"pid": _PROCESS, "tid": _ALLOCATIONS, "cat": category, "id": row, "name": op or category}
        about = {
            "bytes": int(trace.size[row]),
            "requested_bytes": int(trace.requested[row]),
            "category": category,
            "module": trace.modules[int(trace.module[row])],
            "op": op,
            "phase": PHASES[int(trace.phase[row])],
            "step": int(trace.step[row]),
            "micro_batch": int(trace.micro_batch[row]),
        }
        yield {"ph": "b", **shared, "ts": int(trace.born[row]), "args": about}
        yield {"ph": "e", **shared, "ts": freed if freed >= 0 else trace.events}
