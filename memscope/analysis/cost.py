"""Read the estimated step time in a trace, by phase, module and operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memscope.errors import UsageError
from memscope.trace import PHASES, Phase, Trace

__all__ = [
    "COLUMNS",
    "Cost",
    "last_step_seconds",
    "module_seconds",
    "operator_costs",
    "step_seconds",
    "total_seconds",
]

COLUMNS = ("step", "micro_batch", "phase", "module", "op", "calls", "flops", "bytes", "seconds")
"""Columns of a row in `meta["cost"]`; phase, module and op index `PHASES` and the trace's `modules` and `ops`."""


class Cost(NamedTuple):
    """The cost of all calls of an operator in a module."""

    calls: int
    flops: int
    moved_bytes: int
    seconds: float


class _Row(NamedTuple):
    step: int
    micro_batch: int
    phase: int
    module: int
    op: int
    calls: int
    flops: int
    moved_bytes: int
    seconds: float


def step_seconds(trace: Trace, step: int, *, micro_batch: int | None = None) -> dict[Phase, float] | None:
    """Estimated seconds of each phase of a step, in the order of `PHASES`; None if the trace has no estimate.

    With `micro_batch`, only what ran in that micro-batch counts; the optimizer runs in the last one.
    """
    if trace.meta.get("cost") is None:
        return None
    seconds = [0.0] * len(PHASES)
    for row in _rows(trace, step, micro_batch=micro_batch):
        seconds[row.phase] += row.seconds
    return {phase: total for phase, total in zip(PHASES, seconds, strict=True) if total}


def last_step_seconds(trace: Trace) -> float | None:
    """Seconds of the last step: measured if the step really ran, else estimated; None if neither is known."""
    if trace.meta.get("seconds"):
        return float(trace.meta["seconds"][-1])
    return total_seconds(step_seconds(trace, trace.steps[-1]) if trace.steps else None)


def total_seconds(phases: dict[Phase, float] | None) -> float | None:
    """Estimated seconds of a step.

    Inference counts only where the step has no phase of training; elsewhere it stands between steps, like evaluation.
    """
    if phases is None:
        return None
    trains = bool(phases.keys() - {"setup", "inference", "outside"})
    return sum(seconds for phase, seconds in phases.items() if phase != "inference" or not trains)


def module_seconds(
    trace: Trace, prefix: str, *, step: int, phase: Phase | None = None, micro_batch: int | None = None
) -> float:
    """Estimated seconds of the module named `prefix` and its submodules, in one phase or in a whole step.

    Raises:
        UsageError: the trace has no estimate.
    """
    wanted = {i for i, name in enumerate(trace.modules) if name == prefix or name.startswith(f"{prefix}.")}
    return sum(row.seconds for row in _rows(trace, step, phase, micro_batch) if row.module in wanted)


def operator_costs(
    trace: Trace, *, step: int, phase: Phase | None = None, micro_batch: int | None = None
) -> dict[tuple[str, str], Cost]:
    """Costs by (module, operator), in one phase and micro-batch or in a whole step.

    Operators are named with their overload, such as `aten.mm.default`. Calls that run no kernel are left out.

    Raises:
        UsageError: the trace has no estimate.
    """
    costs: dict[tuple[str, str], Cost] = {}
    for row in _rows(trace, step, phase, micro_batch):
        key = trace.modules[row.module], trace.ops[row.op]
        calls, flops, moved_bytes, seconds = costs.get(key, Cost(0, 0, 0, 0.0))
        costs[key] = Cost(calls + row.calls, flops + row.flops, moved_bytes + row.moved_bytes, seconds + row.seconds)
    return costs


def _rows(trace: Trace, step: int, phase: Phase | None = None, micro_batch: int | None = None) -> Iterator[_Row]:
    cost = trace.meta.get("cost")
    if cost is None:
        device = trace.meta.get("device", {}).get("name", "?")
        raise UsageError(
            f'the trace has no time estimate: the rates of device "{device}" are not known, or the run was measured. '
            "Simulate a specific GPU, such as --device a100-40gb"
        )
    wanted = None if phase is None else PHASES.index(phase)
    for values in cost["rows"]:
        row = _Row(*values)
        in_phase = wanted is None or row.phase == wanted
        if row.step == step and in_phase and (micro_batch is None or row.micro_batch == micro_batch):
            yield row
