"""The data with which a page draws the curves of a run in more detail when a reader zooms in."""

from __future__ import annotations

from typing import Any

import numpy as np

from memscope.dashboards.downsample import shown_events
from memscope.dashboards.names import spoken
from memscope.dashboards.timeline import shown_categories
from memscope.trace import Ints, Trace

__all__ = ["MOST_HELD", "curve_data", "differences", "events_to_hold"]

MOST_HELD = 80_000
"""Events of one run that a page holds by default, in addition to those it shows at first; one takes 5 to 20 bytes,
packed."""
_NEAR_PEAK = 8
"""So large a part of the events held, one in so many, lies just before the peak, and as large a part just after it."""


def events_to_hold(trace: Trace, shown: Ints, most: int = MOST_HELD) -> Ints:
    """The events whose values a page holds, in order: int64 `[held]`.

    A short run keeps all its events. A long run keeps those shown at first, all events around the peak, and the highest
    and the lowest of each of equal stretches.

    Args:
        trace: the run.
        shown: events shown at first: int64 `[shown]`.
        most: the most further events to hold, at least 8.

    Raises:
        UsageError: when the trace is empty.
    """
    peak, reach = trace.peak.event, most // _NEAR_PEAK
    near_peak = np.arange(max(0, peak - reach), min(trace.events, peak + reach + 1))
    return np.union1d(shown, shown_events(trace.allocated, near_peak, most))


def curve_data(trace: Trace, held: Ints) -> dict[str, Any]:
    """The curves at the events held, and each event, as JSON values for curves.js.

    Values that change from event to event are given as differences, which pack well.
    """
    row = np.empty(trace.events, dtype=np.int64)
    row[trace.born] = np.arange(len(trace))
    died = np.flatnonzero(trace.freed >= 0)
    row[trace.freed[died]] = died
    row = row[held]
    happened = {
        "born": (trace.born[row] == held).astype(np.int64),
        "size": trace.size[row],
        "category": trace.category[row],
        "module": trace.module[row],
        "op": trace.op[row],
    }
    marks = {"phase": trace.mark_phase, "step": trace.mark_step, "microBatch": trace.mark_micro_batch}
    return {
        "runEvents": trace.events,
        "events": differences(held),
        "sizes": {
            spoken(category): differences(trace.timeline(category)[held]) for category in shown_categories(trace)
        },
        "reserved": differences(trace.reserved[held]) if trace.reserved.size else None,
        "happened": {name: column.tolist() for name, column in happened.items()},
        "marks": {name: column.tolist() for name, column in marks.items()} | {"event": differences(trace.mark_event)},
    }


def differences(values: Ints) -> list[int]:
    """Each value minus the one before it; the first is unchanged."""
    changes: list[int] = np.diff(values, prepend=0).tolist()
    return changes
