"""The data with which a page lists the allocations alive at any moment: the largest ones, and the number of all."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from memscope.dashboards.detail import differences
from memscope.trace import Ints, Trace

__all__ = ["MOST_KEPT", "KeptAllocations", "kept_allocations", "page_data"]

MOST_KEPT = 60_000
"""Allocations of one run that a page holds by default; one takes about 10 bytes, packed."""


class KeptAllocations(NamedTuple):
    """The allocations alive at one of the events shown, or the largest of them."""

    rows: Ints
    """Their indices in the trace, in order of birth."""
    largest_left_out_bytes: int
    """Size of the largest allocation left out although it is alive at an event shown; 0 when there is no such one."""


def kept_allocations(trace: Trace, shown: Ints, most: int = MOST_KEPT) -> KeptAllocations:
    """The allocations to keep for the events shown: all that are alive at one of them, if few enough.

    Otherwise those alive at the peak come first, then the others; within both, larger ones come before smaller ones.

    Args:
        trace: the run.
        shown: the events, in order: int64 `[shown]`.
        most: the most to keep.
    """
    ends = np.where(trace.freed < 0, trace.events, trace.freed)
    seen = np.flatnonzero(np.searchsorted(shown, trace.born) < np.searchsorted(shown, ends))
    if seen.size <= most:
        return KeptAllocations(seen, 0)
    peak = trace.peak.event
    at_peak = (trace.born[seen] <= peak) & (peak < ends[seen])
    order = np.lexsort((-trace.size[seen], ~at_peak))
    left_out = seen[order[most:]]
    return KeptAllocations(np.sort(seen[order[:most]]), int(trace.size[left_out].max()))


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
