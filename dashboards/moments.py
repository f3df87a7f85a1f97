"""What a page holds to say what is alive at any moment it can show: the largest allocations, and how many there are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memscope.dashboards.detail import differences
from memscope.trace import Trace

__all__ = ["MOST_KEPT", "Kept", "kept_allocations", "page_data"]

MOST_KEPT = 60_000
"""Allocations of one run that a page holds by default; one takes some 10 bytes of it, packed."""

Ints = npt.NDArray[np.int64]


class Kept(NamedTuple):
    """Allocations that are alive at one of the events shown, or the largest of them."""

    rows: Ints
    """Their indices in the trace, in order of birth."""
    largest_left_out_bytes: int
    """Size of the largest that is alive at an event shown and not among them; 0 when none is left out."""


def kept_allocations(trace: Trace, shown: Ints, most: int = MOST_KEPT) -> Kept:
    """Which allocations to keep for the events shown: all that are alive at one of them, if they are few enough.

    Otherwise those alive at the peak come first, then the others; the larger ones before the smaller, each time.

    Args:
        trace: the run.
        shown: the events, in order: int64 `[shown]`.
        most: largest number to keep.
    """
    ends = np.where(trace.freed < 0, trace.events, trace.freed)
    seen = np.flatnonzero(np.searchsorted(shown, trace.born) < np.searchsorted(shown, ends))
    if seen.size <= most:
        return Kept(seen, 0)
    peak = trace.peak.event
    at_peak = (trace.born[seen] <= peak) & (peak < ends[seen])
    order = np.lexsort((-trace.size[seen], ~at_peak))
    left_out = seen[order[most:]]
    return Kept(np.sort(seen[order[:most]]), int(trace.size[left_out].max()))


def page_data(trace: Trace, held: Ints, most: int = MOST_KEPT) -> dict[str, Any]:
    """The allocations kept for the events held, as JSON values for moment.js."""
    kept = kept_allocations(trace, held, most)
    rows = kept.rows
    freed = trace.freed[rows]
    died_in = np.clip(np.searchsorted(trace.mark_event, freed, side="right") - 1, 0, None)
    columns = {
        "life": np.where(freed < 0, 0, freed - trace.born[rows]),
        "size": trace.size[rows],
        "category": trace.category[rows],
        "module": trace.module[rows],
        "op": trace.op[rows],
        "phase": trace.phase[rows],
        "step": trace.step[rows],
        "microBatch": trace.micro_batch[rows],
        "diedPhase": trace.mark_phase[died_in],
        "diedStep": trace.mark_step[died_in],
    }
    births = np.zeros(trace.events, dtype=np.int64)
    births[trace.born] = 1
    births[trace.freed[trace.freed >= 0]] = -1
    return {
        "peak": trace.peak.event,
        "alive": differences(births.cumsum()[held]),
        "largestLeftOut": kept.largest_left_out_bytes,
        "modules": trace.modules,
        "ops": trace.ops,
        "columns": {name: column.tolist() for name, column in columns.items()}
        | {"born": differences(trace.born[rows])},
    }
