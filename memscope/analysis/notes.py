"""Everything that a reader of a trace must know to believe its numbers; shown wherever the trace is shown."""

from __future__ import annotations

from memscope.analysis.inferred import how_inferred
from memscope.trace import Trace

__all__ = ["assumed", "notes_of", "told_notes"]


def notes_of(trace: Trace) -> list[str]:
    """How columns were inferred, then the notes and assumptions of the run; each ends with a full stop."""
    how = how_inferred(trace)
    return [f"{how}.", *told_notes(trace)] if how else told_notes(trace)


def told_notes(trace: Trace) -> list[str]:
    """The texts of `meta["notes"]`, then what the run assumed; each ends with a full stop."""
    return [f"{str(text).removesuffix('.')}." for text in (*trace.meta.get("notes", []), *assumed(trace))]


def assumed(trace: Trace) -> list[str]:
    """The values that a simulation took for those it could not know (`meta["assumptions"]`), one text each."""
    return [
        f"Assumed: {one['what']}: {one['value']}" + (f" (at {one['where']})" if one["where"] else "")
        for one in trace.meta.get("assumptions", [])
    ]
