"""How long a simulated step would take: the estimate that lies in a trace, and how to ask for it. Needs no torch.

The estimate of one call is made in `memscope.simulation.roofline`; here it is only summed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from memscope.errors import UsageError
from memscope.simulation.devices import Device
from memscope.trace import PHASES, Phase, Trace

if TYPE_CHECKING:
    from memscope.hooks.work import WorkDone

__all__ = [
    "COLUMNS",
    "Cost",
    "cost_table",
    "last_step_seconds",
    "module_seconds",
    "operator_costs",
    "step_seconds",
    "transfer_seconds",
]

COLUMNS = ("step", "micro_batch", "phase", "module", "op", "calls", "flops", "bytes", "seconds")
"""Of a row in `meta["cost"]`; phase, module and op index `PHASES` and the trace's `modules` and `ops`."""


class Cost(NamedTuple):
    """What an operator does in a module, all its calls together."""

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


def cost_table(done: WorkDone, assumed: Collection[str]) -> dict[str, Any]:
    """What a trace keeps of an estimate, as JSON values; seconds to the nanosecond."""
    rows = [[*place, *counts, round(seconds, 9)] for place, (*counts, seconds) in done.sums.items()]
    return {"estimate": True, "assumed": sorted(assumed), "columns": list(COLUMNS), "rows": rows}


def step_seconds(trace: Trace, step: int) -> dict[Phase, float] | None:
    """Estimated seconds of each phase of a step, in the order of `PHASES`; None where there is no estimate."""
    if trace.meta.get("cost") is None:
        return None
    seconds = [0.0] * len(PHASES)
    for row in _rows(trace, step):
        seconds[row.phase] += row.seconds
    return {phase: total for phase, total in zip(PHASES, seconds, strict=True) if total}


def last_step_seconds(trace: Trace) -> float | None:
    """Seconds of the last step: measured where it was really run, else estimated; None where they are not known."""
    if trace.meta.get("seconds"):
        return float(trace.meta["seconds"][-1])
    estimate = step_seconds(trace, trace.steps[-1]) if trace.steps else None
    return None if estimate is None else sum(estimate.values())


def module_seconds(
    trace: Trace, prefix: str, *, step: int, phase: Phase | None = None, micro_batch: int | None = None
) -> float:
    """Estimated seconds of the module called `prefix` and all within it, in one phase or in all of a step.

    Raises:
        UsageError: when the trace has no estimate.
    """
    wanted = {i for i, name in enumerate(trace.modules) if name == prefix or name.startswith(f"{prefix}.")}
    return sum(row.seconds for row in _rows(trace, step, phase, micro_batch) if row.module in wanted)


def operator_costs(
    trace: Trace, *, step: int, phase: Phase | None = None, micro_batch: int | None = None
) -> dict[tuple[str, str], Cost]:
    """By (module, operator): what was done in one phase and micro-batch, or in all of a step.

    Operators are named with their overload, such as `aten.mm.default`. Calls that run no kernel are not there.

    Raises:
        UsageError: when the trace has no estimate.
    """
    costs: dict[tuple[str, str], Cost] = {}
    for row in _rows(trace, step, phase, micro_batch):
        key = trace.modules[row.module], trace.ops[row.op]
        calls, flops, moved_bytes, seconds = costs.get(key, Cost(0, 0, 0, 0.0))
        costs[key] = Cost(calls + row.calls, flops + row.flops, moved_bytes + row.moved_bytes, seconds + row.seconds)
    return costs


def transfer_seconds(device: Device, size_bytes: int) -> float:
    """Estimated seconds that copying to or from the host takes when nothing else uses the link; pinned host memory.

    Raises:
        UsageError: when the device's link to the host is not known.
    """
    rate = device.host_bytes_per_second
    if rate is None:
        raise UsageError(
            f'how fast "{device.name}" copies to the host is not known: choose a certain GPU ("memscope devices" lists '
            "them), or set host_bytes_per_second in the device file"
        )
    return size_bytes / rate


def _rows(trace: Trace, step: int, phase: Phase | None = None, micro_batch: int | None = None) -> Iterator[_Row]:
    cost = trace.meta.get("cost")
    if cost is None:
        device = trace.meta.get("device", {}).get("name", "?")
        raise UsageError(
            f'the trace has no estimate of time: the rates of device "{device}" are not known, or it was really run. '
            "Simulate a certain GPU, such as --device a100-40gb"
        )
    wanted = None if phase is None else PHASES.index(phase)
    for values in cost["rows"]:
        row = _Row(*values)
        in_phase = wanted is None or row.phase == wanted
        if row.step == step and in_phase and (micro_batch is None or row.micro_batch == micro_batch):
            yield row
