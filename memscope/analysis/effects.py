"""Table 1: the effect of each strategy on parameter, activation, gradient and optimizer memory, and on computation.

Memory rows compare each category's peak over a steady step: the second step, when the optimizer state exists. An arrow
is drawn only for a change of more than 1 % and 1 MiB (computation: more than 1 %).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from memscope.analysis.host import host_bytes, host_peak
from memscope.errors import UsageError
from memscope.trace import CATEGORIES, PHASES, Category, Ints, Trace
from memscope.units import format_bytes, format_change, format_flop, format_flop_change

__all__ = ["ROWS", "TITLES", "Column", "Effect", "Run", "Table1", "compare", "steady_step"]

Row = Literal["parameter", "activation", "gradient", "optimizer_state", "computation", "host"]
Arrow = Literal["↑", "↓", "–"]
ROWS: tuple[Row, ...] = ("parameter", "activation", "gradient", "optimizer_state", "computation")
"""The rows of every Table 1. One in which a run keeps something on the host also has the row `host`."""
TITLES: Mapping[Row, str] = {
    "parameter": "parameter (+ weight copies)",
    "activation": "activation",
    "gradient": "gradient",
    "optimizer_state": "optimizer state",
    "computation": "computation (FLOPs)",
    "host": "host memory",
}
"""Title of each row."""
_COUNTED: Mapping[Row, tuple[Category, ...]] = {
    "parameter": ("parameter", "weight_copy"),
    "activation": ("activation",),
    "gradient": ("gradient",),
    "optimizer_state": ("optimizer_state",),
}
"""Categories that each memory row sums."""
_LEAST_PERCENT, _LEAST_BYTES = 1, 2**20
_FORWARD = ("forward", "loss", "recompute")
"""Phases whose allocations autograd can keep for the backward pass."""


@dataclass(frozen=True)
class Run:
    """A trace, the label of its plan, and the plan's textbook effect (row to arrow; may be empty)."""

    label: str
    trace: Trace
    textbook: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Effect:
    """One cell: bytes (memory rows) or floating-point operations (computation) before and after."""

    row: Row
    arrow: Arrow
    before: int
    after: int
    parts: tuple[tuple[str, int, int], ...] = ()
    """Categories that the row sums, each with its own peak before and after; empty for a row of one category."""
    seconds: tuple[float, float] | None = None
    """Seconds of the steady step before and after, if both were measured."""
    note: str = ""
    """Why the effect differs from the textbook; empty if it does not, or the textbook says nothing."""

    @property
    def share(self) -> float:
        """Change as a fraction of `before`; infinite if only `before` is zero."""
        if self.before:
            return (self.after - self.before) / self.before
        return float("inf") if self.after else 0.0

    def __str__(self) -> str:
        change = self.after - self.before
        if not change:
            return self.arrow
        shown = format_flop_change(change) if self.row == "computation" else format_change(change)
        share = "new" if self.share == float("inf") else f"{self.share:+.1%}"
        # In brackets, an unchanged row's dash does not read as a minus.
        return f"– ({shown}, {share})" if self.arrow == "–" else f"{self.arrow} {shown} ({share})"


@dataclass(frozen=True)
class Column:
    """The effects of one plan, and a description of the comparison."""

    label: str
    comparison: str
    effects: tuple[Effect, ...]

    def __getitem__(self, row: str) -> Effect:
        return next(effect for effect in self.effects if effect.row == row)


@dataclass(frozen=True)
class Table1:
    """One column per plan, all compared with the same baseline."""

    columns: tuple[Column, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows, which all columns have."""
        return tuple(effect.row for effect in self.columns[0].effects) if self.columns else ()

    def arrows(self) -> dict[str, dict[str, str]]:
        """The arrows as `{plan: {row: arrow}}`."""
        return {column.label: {effect.row: effect.arrow for effect in column.effects} for column in self.columns}


def compare(baseline: Trace, runs: Sequence[Run]) -> Table1:
    """Compare each run with the baseline.

    Raises:
        UsageError: a trace has no training step.
    """
    has_host = any(host_peak(trace) for trace in (baseline, *(run.trace for run in runs)))
    rows: tuple[Row, ...] = (*ROWS, "host") if has_host else ROWS
    return Table1(tuple(_column(baseline, run, rows) for run in runs))


def steady_step(trace: Trace) -> int:
    """The step to compare: the second one, or the only one.

    Raises:
        UsageError: the trace has no training step.
    """
    if not trace.steps:
        raise UsageError("the trace has no training step to compare: record at least one, or better two")
    return trace.steps[:2][-1]


def _column(baseline: Trace, run: Run, rows: Sequence[Row]) -> Column:
    comparison = (
        f"peak of each category in step {steady_step(run.trace)} with the strategy, compared with step "
        f"{steady_step(baseline)} of the baseline; computation: floating-point operations of the same steps"
    )
    return Column(run.label, comparison, tuple(_effect(row, baseline, run) for row in rows))


def _effect(row: Row, baseline: Trace, run: Run) -> Effect:
    if row == "host":
        before, after = (host_bytes(trace, steady_step(trace)) for trace in (baseline, run.trace))
        return Effect(row, _arrow(before, after, _LEAST_BYTES), before, after)
    effect = _computation(baseline, run.trace) if row == "computation" else _memory(row, baseline, run.trace)
    usual = run.textbook.get(row)
    if not usual or usual == effect.arrow:
        return effect
    reason = _computation_reason(effect) if row == "computation" else _memory_reason(effect, baseline, run.trace)
    return dataclasses.replace(effect, note=f"usually {usual}, here {effect.arrow}: {reason}")


def _computation(baseline: Trace, trace: Trace) -> Effect:
    before, after = _in_steady_step(baseline, "flops"), _in_steady_step(trace, "flops")
    seconds = _in_steady_step(baseline, "seconds"), _in_steady_step(trace, "seconds")
    measured = None if None in seconds else seconds
    return Effect("computation", _arrow(before, after, 0), before, after, seconds=measured)


def _memory(row: Row, baseline: Trace, trace: Trace) -> Effect:
    categories = _COUNTED[row]
    before, after = _largest(baseline, *categories), _largest(trace, *categories)
    parts = tuple((c, _largest(baseline, c), _largest(trace, c)) for c in categories) if len(categories) > 1 else ()
    return Effect(row, _arrow(before, after, _LEAST_BYTES), before, after, parts)


def _arrow(before: int, after: int, least: int) -> Arrow:
    change = after - before
    if abs(change) <= least or 100 * abs(change) <= _LEAST_PERCENT * before:
        return "–"
    return "↑" if change > 0 else "↓"


def _in_steady_step(trace: Trace, name: str) -> Any:
    """The steady step's entry of a list in `meta` with one entry per complete step; None if there is none."""
    values, step = trace.meta.get(name) or (), steady_step(trace)
    return values[step] if step < len(values) else None


def _curve(trace: Trace, *categories: Category) -> Ints:
    """Total bytes of several categories after each event of the steady step: int64 `[events of the step]`."""
    first, last = trace.step_range(steady_step(trace))
    curve: Ints = np.sum([trace.timeline(category)[first:last] for category in categories], axis=0)
    return curve


def _largest(trace: Trace, *categories: Category) -> int:
    return int(_curve(trace, *categories).max(initial=0))


def _computation_reason(effect: Effect) -> str:
    return _became(format_flop(effect.before), format_flop(effect.after))


def _memory_reason(effect: Effect, baseline: Trace, trace: Trace) -> str:
    """The largest difference between the two traces, at the moments where the row peaks."""
    if effect.arrow == "–":
        return _became(format_bytes(effect.before), format_bytes(effect.after))
    before, after = (_origins(t, _COUNTED[effect.row]) for t in (baseline, trace))
    changes = {origin: after.get(origin, 0) - before.get(origin, 0) for origin in before | after}
    sign = 1 if effect.arrow == "↑" else -1
    category, op, phase = origin = max(changes, key=lambda origin: sign * changes[origin])
    kept = _kept(trace, *origin) if effect.arrow == "↑" else ""
    made = f"{op or 'the model'} in {phase.replace('_', ' ')}{kept}"
    return f"{format_change(changes[origin])} of {category.replace('_', ' ')} made by {made}"


def _became(before: str, after: str) -> str:
    return f"{before}, as before" if before == after else f"{before} became {after}"


def _origins(trace: Trace, categories: tuple[Category, ...]) -> dict[tuple[Category, str, str], int]:
    """Bytes by category, operator and phase, at the event of the steady step where the sum of the categories peaks."""
    first, _ = trace.step_range(steady_step(trace))
    at = first + int(np.argmax(_curve(trace, *categories)))
    return {
        origin: size for origin, size in trace.by("category", "op", "phase", at=at).items() if origin[0] in categories
    }


def _kept(trace: Trace, category: Category, op: str, phase: str) -> str:
    """How many allocations of one origin are still alive when the next backward pass begins, in words."""
    if phase not in _FORWARD:
        return ""
    chosen = (trace.category == CATEGORIES.index(category)) & (trace.phase == PHASES.index(phase))
    chosen &= (trace.op == trace.ops.index(op)) & (trace.step == steady_step(trace))
    backward = np.append(trace.mark_event[trace.mark_phase == PHASES.index("backward")], trace.events)
    begins = backward[np.searchsorted(backward, trace.born[chosen], side="right")]
    freed = np.where(trace.freed < 0, trace.events, trace.freed)[chosen]
    kept = np.count_nonzero((begins <= freed) & (begins < trace.events))
    return f"; {kept} of {freed.size} kept for the backward pass" if kept else ""
