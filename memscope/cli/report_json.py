"""Runs as JSON values, sizes in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memscope.allocator.other_settings import helpful_settings
from memscope.analysis.agreement import agreements
from memscope.analysis.alive import largest
from memscope.analysis.chosen import chosen_settings
from memscope.analysis.effects import Run, Table1
from memscope.analysis.fit import fit_of
from memscope.analysis.growth import growing, step_peaks
from memscope.analysis.host import host_peak
from memscope.analysis.inferred import how_inferred, inferred_columns
from memscope.analysis.ledger import ledger
from memscope.analysis.notes import told_notes
from memscope.analysis.phases import phase_peaks
from memscope.analysis.ran_out import in_use
from memscope.trace import Trace

__all__ = ["course_values", "effects_values", "fit_values", "peak_values", "report_document"]

_TOP = 20
"""Number of the largest allocations that are listed for each run."""


def report_document(runs: Sequence[Run], files: Sequence[Path], table: Table1) -> dict[str, Any]:
    """A report as one JSON value."""
    return {
        "schema_version": 1,
        "runs": [_run(run, file) for run, file in zip(runs, files, strict=True)],
        "table1": table.arrows(),
        "effects": effects_values(table),
        "agreement": [
            {
                "predicted": found.predicted,
                "measured": found.measured,
                "bytes": {row.name: {"predicted": row.predicted, "measured": row.measured} for row in found.figures},
            }
            for found in agreements(runs)
        ],
    }


def _run(run: Run, file: Path) -> dict[str, Any]:
    trace, found = run.trace, ledger(run.trace)
    return {
        "label": run.label,
        "trace": str(file),
        "target": trace.meta.get("target"),
        "device": trace.meta.get("device"),
        "strategies": trace.meta.get("strategies"),
        "chosen": chosen_settings(trace),
        "allocations": len(trace),
        "peak": peak_values(trace),
        "out_of_memory": trace.meta.get("out_of_memory"),
        "fit": fit_values(trace),
        "at_peak": trace.by_category(),
        "max_by_category": trace.max_by_category(),
        **course_values(trace),
        "ledger": [dataclasses.asdict(line) for line in found.lines] if found else None,
        "largest": [dataclasses.asdict(one) for one in largest(trace, _TOP)],
        "inferred": list(inferred_columns(trace)),
        "how_inferred": how_inferred(trace) or None,
        "notes": told_notes(trace),
        "assumptions": trace.meta.get("assumptions", []),
    }


def peak_values(trace: Trace) -> dict[str, Any]:
    """The peak, and the figures that other tools show for it; `host` is the peak of what is on the host."""
    peak, found, host = trace.peak, ledger(trace), host_peak(trace)
    totals = {name: found.total(name) if found else None for name in ("requested", "reserved", "device")}
    return {
        "requested": totals["requested"],
        "allocated": peak.allocated_bytes,
        "active": trace.meta.get("peak_active", peak.allocated_bytes) if found else None,
        "reserved": totals["reserved"],
        "device": totals["device"],
        "phase": peak.phase,
        "step": peak.step,
        "host": host.document() if host else None,
    }


def course_values(trace: Trace) -> dict[str, Any]:
    """How the memory of a run changes: by model, phase and step, and what would help.

    `phases`: the peak of each phase. `steps`: that of each step. `growing`: what each of the last steps has left
    behind. `allocator_settings`: those with which the run would fit or reserve less. `alive_when_out_of_memory`: bytes
    by category and module; empty if the run fits.
    """
    return {
        "models": trace.meta.get("models", {}),
        "phases": [
            {
                "phase": one.phase,
                "step": one.step,
                "allocated": one.allocated_bytes,
                "reserved": one.reserved_bytes,
                "kept_by_module": dict(one.kept),
            }
            for one in phase_peaks(trace)
        ],
        "steps": [
            {
                "step": one.step,
                "allocated": one.allocated_bytes,
                "reserved": one.reserved_bytes,
                "not_allocated": one.unused_bytes,
            }
            for one in step_peaks(trace)
        ],
        "growing": [
            {
                "category": one.category,
                "module": one.module,
                "op": one.op,
                "steps": list(one.steps),
                "bytes": one.size_bytes,
            }
            for one in growing(trace)
        ],
        "allocator_settings": [
            {"setting": one.text, "reserved": one.reserved_bytes} for one in helpful_settings(trace)
        ],
        "alive_when_out_of_memory": [
            {"category": category, "module": module, "bytes": size_bytes}
            for (category, module), size_bytes in in_use(trace)
        ],
    }


def fit_values(trace: Trace) -> dict[str, Any] | None:
    """Whether a simulated run fits its device; None where that has no meaning (`memscope.analysis.fit.fit_of`)."""
    fit = fit_of(trace)
    return None if fit is None else fit.document()


def effects_values(table: Table1) -> dict[str, Any]:
    """Every cell of Table 1."""
    return {
        column.label: {
            e.row: {"arrow": e.arrow, "before": e.before, "after": e.after, "note": e.note or None}
            for e in column.effects
        }
        for column in table.columns
    }
