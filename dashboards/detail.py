"""What a page holds of a run's curves, to show more of them where a reader zooms in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from memscope.dashboards.downsample import shown_events
from memscope.dashboards.timeline import shown_categories
from memscope.trace import Trace

__all__ = ["MOST_HELD", "curve_data", "differences", "events_to_hold"]

MOST_HELD = 80_000
"""Events of one run that a page holds by default, beside those it shows at first; one takes 5 to 20 bytes, packed."""
_NEAR_PEAK = 8
"""One in so many of the events held lies before the peak without a gap, and as many after it."""

Ints = npt.NDArray[np.int64]


def events_to_hold(trace: Trace, shown: Ints, most: int = MOST_HELD) -> Ints:
    """The events whose values a page holds, in order: int64 `[held]`.

    All of them when they are few enough. Otherwise those shown at first, all around the peak, and of equal stretches of
    the run the highest and the lowest.

    Args:
        trace: the run.
        shown: events shown of the whole run: int64 `[shown]`.
        most: largest number of further events to hold, at least 8.

    Raises:
        UsageError: when the trace is empty.
    """
    peak, reach = trace.peak.event, most // _NEAR_PEAK
    near_peak = np.arange(max(0, peak - reach), min(trace.events, peak + reach + 1))
    return np.union1d(shown, shown_events(trace.allocated, near_peak, most))


def curve_data(trace: Trace, held: Ints) -> dict[str, Any]:
    """The curves at the events held and what happened there, as JSON values for curves.js.

    Numbers that go up and down from event to event are given as differences, which pack well.
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
        "sizes": {category: differences(trace.timeline(category)[held]) for category in shown_categories(trace)},
        "reserved": differences(trace.reserved[held]) if trace.reserved.size else None,
        "happened": {name: column.tolist() for name, column in happened.items()},
        "marks": {name: column.tolist() for name, column in marks.items()} | {"event": differences(trace.mark_event)},
    }


def differences(values: Ints) -> list[int]:
    """Each value less the one before it; the first as it is."""
    changes: list[int] = np.diff(values, prepend=0).tolist()
    return changes
