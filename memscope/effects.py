"""Table 1: what each strategy does to parameter, activation, gradient and optimizer memory and to computation, from runs.

Memory rows compare each category's largest size over a steady step: the second one, where the optimizer's state is there. An arrow is
drawn only for a change beyond 1 % and 1 MiB (computation: beyond 1 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from memscope.trace import CATEGORIES, PHASES, Category, Trace
from memscope.units import format_bytes, format_change

__all__ = ["ROWS", "Column", "Effect", "Run", "Table1", "compare"]

Row = Literal["parameter", "activation", "gradient", "optimizer_state", "computation"]
Arrow = Literal["↑", "↓", "–"]
ROWS: tuple[Row, ...] = ("parameter", "activation", "gradient", "optimizer_state", "computation")
_COUNTED: dict[str, tuple[Category, ...]] = {"parameter": ("parameter", "weight_copy")}
_LEAST_SHARE, _LEAST_BYTES = 0.01, 2**20


@dataclass(frozen=True)
class Run:
    """A trace with the name of its plan, and what is usually said of that plan (row to arrow; empty for none)."""

    label: str
    trace: Trace
    textbook: Mapping[str, str]


@dataclass(frozen=True)
class Effect:
    """One cell: bytes (of a memory row) or floating-point operations (of computation) before and after."""

    row: Row
    arrow: Arrow
    before: int
    after: int
    parts: tuple[tuple[str, int, int], ...] = ()
    """Categories that a row counts together, each with its own largest size before and after."""
    seconds: tuple[float, float] | None = None
    """Of the steady step before and after, where both were really run."""
    note: str = ""
    """Why it is not what is usually said; empty when it is, or nothing is said."""

    @property
    def share(self) -> float:
        """Change as a share of `before`; infinite when that was zero."""
        return (self.after - self.before) / self.before if self.before else (0.0 if self.after == 0 else float("inf"))

    def __str__(self) -> str:
        if self.row == "computation":
            change = f"{self.after - self.before:+.2e} FLOPs"
        else:
            change = format_change(self.after - self.before)
        share = "new" if self.share == float("inf") else f"{self.share:+.1%}"
        return f"{self.arrow} {change} ({share})"


@dataclass(frozen=True)
class Column:
    """The effects of one plan, and the two runs they rest on."""

    label: str
    comparison: str
    effects: tuple[Effect, ...]

    def __getitem__(self, row: str) -> Effect:
        return next(effect for effect in self.effects if effect.row == row)


@dataclass(frozen=True)
class Table1:
    """One column a plan, all against the same baseline."""

    columns: tuple[Column, ...]

    def arrows(self) -> dict[str, dict[str, str]]:
        """`{plan: {row: arrow}}`."""
        return {column.label: {effect.row: effect.arrow for effect in column.effects} for column in self.columns}


def compare(baseline: Trace, runs: Sequence[Run]) -> Table1:
    """Each run against the baseline."""
    return Table1(tuple(_column(baseline, run) for run in runs))


def steady_step(trace: Trace) -> int:
    """The second step, or the only one."""
    return trace.steps[min(1, len(trace.steps) - 1)]


def _column(baseline: Trace, run: Run) -> Column:
    step = steady_step(run.trace)
    comparison = (
        f"{run.label}: largest size of each category in step {step} of the run with it, against step {steady_step(baseline)} "
        "of the baseline; computation: floating-point operations of the same steps"
    )
    return Column(run.label, comparison, tuple(_effect(row, baseline, run) for row in ROWS))


def _effect(row: Row, baseline: Trace, run: Run) -> Effect:
    if row == "computation":
        before, after = _flops(baseline), _flops(run.trace)
        effect = Effect(row, _arrow(before, after, 0), before, after, seconds=_seconds(baseline, run.trace))
    else:
        categories: tuple[Category, ...] = _COUNTED.get(row, (row,))
        before, after = _largest(baseline, categories), _largest(run.trace, categories)
        parts = tuple((c, _largest(baseline, (c,)), _largest(run.trace, (c,))) for c in categories) if len(categories) > 1 else ()
        effect = Effect(row, _arrow(before, after, _LEAST_BYTES), before, after, parts)
    said = run.textbook.get(row)
    if said is None or said == effect.arrow:
        return effect
    return Effect(row, effect.arrow, before, after, effect.parts, effect.seconds, f"usually {said}, here {_reason(effect, baseline, run)}")


def _arrow(before: int, after: int, least: int) -> Arrow:
    change = after - before
    if abs(change) <= least or abs(change) <= _LEAST_SHARE * before:
        return "–"
    return "↑" if change > 0 else "↓"


def _flops(trace: Trace) -> int:
    return int(trace.meta["flops"][steady_step(trace)])


def _seconds(before: Trace, after: Trace) -> tuple[float, float] | None:
    measured = [trace.meta.get("seconds") for trace in (before, after)]
    if not all(measured):
        return None
    return float(measured[0][steady_step(before)]), float(measured[1][steady_step(after)])


def _curve(trace: Trace, categories: tuple[Category, ...]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    first, last = trace.step_range(steady_step(trace))
    return np.sum([trace.timeline(c)[first:last] for c in categories], axis=0)  # type: ignore[no-any-return]


def _largest(trace: Trace, categories: tuple[Category, ...]) -> int:
    return int(_curve(trace, categories).max(initial=0))


def _reason(effect: Effect, baseline: Trace, run: Run) -> str:
    """What the two traces differ in most, at the moments where the row is largest."""
    if effect.row == "computation":
        return f"{effect.arrow}: {effect.before:.3e} FLOPs became {effect.after:.3e}"
    if effect.arrow == "–":
        return f"–: {format_bytes(effect.before)} became {format_bytes(effect.after)}"
    categories: tuple[Category, ...] = _COUNTED.get(effect.row, (effect.row,))
    before, after = _origins(baseline, categories), _origins(run.trace, categories)
    changes = {origin: after.get(origin, 0) - before.get(origin, 0) for origin in before.keys() | after.keys()}
    (category, op, phase), change = max(changes.items(), key=lambda item: abs(item[1]) if item[1] * (effect.after - effect.before) > 0 else -1)
    return f"{effect.arrow}: {format_change(change)} of {category} made by {op or 'the model'} in {phase}{_kept(run.trace, category, op)}"


def _origins(trace: Trace, categories: tuple[Category, ...]) -> dict[tuple[str, str, str], int]:
    first, _ = trace.step_range(steady_step(trace))
    at = first + int(np.argmax(_curve(trace, categories)))
    return {origin: size for origin, size in trace.by("category", "op", "phase", at=at).items() if origin[0] in categories}


def _kept(trace: Trace, category: str, op: str) -> str:
    """Whether such allocations outlive the forward pass, in words."""
    chosen = (trace.category == CATEGORIES.index(category)) & (trace.op == trace.ops.index(op) if op in trace.ops else False)  # type: ignore[arg-type]
    chosen &= trace.step == steady_step(trace)
    backward = trace.mark_event[trace.mark_phase == PHASES.index("backward")]
    kept = [bool(((backward > b) & (backward < f)).any()) for b, f in zip(trace.born[chosen], trace.freed[chosen], strict=True)]
    return f", {sum(kept)} of {len(kept)} of them kept for the backward pass" if any(kept) else ""
