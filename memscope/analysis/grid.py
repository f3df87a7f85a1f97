"""Table 2: the memory and time of every combination of several strategies, each off or with one of its settings.

Combinations with the same settings of the target process the same samples per step. A strategy that changes how
samples are processed defines the run without it (`Strategy.baseline`): gradient accumulation, for example, by the same
effective batch in one micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memscope.analysis.cost import last_step_seconds
from memscope.errors import MemscopeError, OutOfDeviceMemory, UsageError
from memscope.strategies import Plan, Strategy
from memscope.trace import Trace

__all__ = ["Cell", "Combination", "Grid", "SettingValue", "combinations", "table2"]


@dataclass(frozen=True)
class SettingValue:
    """A value of a target's setting, as a factor of the grid."""

    key: str
    value: str

    @property
    def spec(self) -> str:
        """`n_layers=1`."""
        return f"{self.key}={self.value}"


@dataclass(frozen=True)
class Combination:
    """What one run of the grid has."""

    applied: tuple[bool, ...]
    """Whether it has each factor: the values of settings, then the strategies; of alternatives, one at most."""
    settings: Mapping[str, str]
    """Its values of the settings that vary."""
    plan: Plan


@dataclass(frozen=True)
class Cell:
    """One combination of strategies."""

    applied: tuple[bool, ...]
    """Whether each of the grid's factors is applied, in their order; of alternatives, one at most is."""
    fits: bool | None
    """None: not known, because the run failed."""
    allocated_bytes: int | None
    """Peak allocated bytes. If the combination does not fit: with unlimited memory if simulated, None if measured."""
    reserved_bytes: int | None
    """Peak reserved bytes, likewise; None also on a device without a caching allocator."""
    seconds: float | None
    """Time of a run over all samples; None if the combination does not fit, or the time is not known."""
    failure: str = ""
    """Why the run failed; empty if it did not."""
    samples_per_step: int | None = None
    """None if the samples of a batch cannot be counted (the cell then has no time), or there is no trace."""


@dataclass(frozen=True)
class Grid:
    """Table 2: one cell per combination, beginning with no strategy at all."""

    target: str
    device: str
    predicted: bool
    """True: memory is simulated and time is estimated. False: both were measured."""
    factors: tuple[str, ...]
    """Values of the target's settings that vary, as KEY=VALUE, then strategies with their settings, in plan syntax.
    Alternatives are factors of their own."""
    cells: tuple[Cell, ...]
    samples: int
    memory_bytes: int | None
    """PyTorch's memory limit on the GPU, if one was set; else None."""
    limit_bytes: int | None
    """`memory_bytes`, or else the device's memory minus its CUDA context, if known; None on the CPU."""

    @property
    def samples_per_step(self) -> list[int]:
        """The numbers of samples that a step of a cell has, smallest first; several if a setting changes them."""
        return sorted({cell.samples_per_step for cell in self.cells if cell.samples_per_step})

    def steps(self, samples_per_step: int) -> int:
        """Optimizer steps of so many samples that all samples take, rounded up."""
        return _steps(self.samples, samples_per_step)


def combinations(
    factors: Sequence[Sequence[Strategy]], settings: Sequence[Sequence[SettingValue]] = ()
) -> list[Combination]:
    """Every combination, of the strategies from none to all; the first changes slowest.

    Args:
        factors: the strategies, each with its alternatives, of which a combination has one or none.
        settings: settings of the target, each with its values, of which a combination has one.

    Raises:
        UsageError: `factors` is empty, has a strategy twice, or has a combination that cannot be used.
    """
    if not factors:
        raise UsageError("the grid has no strategy: name the strategies to combine, for example --grid ga,amp,lora")
    found = []
    for values in itertools.product(*settings):
        for chosen in itertools.product(*([None, *alternatives] for alternatives in factors)):
            pairs = zip((*values, *chosen), (*settings, *factors), strict=True)
            applied = tuple(one is two for one, each in pairs for two in each)
            found.append(Combination(applied, {one.key: one.value for one in values}, Plan.of(*filter(None, chosen))))
    return found


def table2(
    factors: Sequence[SettingValue | Strategy],
    runs: Sequence[tuple[tuple[bool, ...], Trace | MemscopeError]],
    samples: int,
    memory_bytes: int | None = None,
) -> Grid:
    """Build Table 2 from the trace of each run, or its error: `OutOfDeviceMemory` if the weights do not fit.

    The time of a run is that of its last step, measured or estimated, times the number of steps for `samples`.

    Raises:
        OutOfDeviceMemory: no run has a trace.
        UsageError: runs with the same settings process different numbers of samples per step, so they cannot be
            compared.
    """
    traces = [trace for _, trace in runs if isinstance(trace, Trace)]
    if not traces:
        raise OutOfDeviceMemory(
            "the weights do not fit in any combination: choose a larger device, a smaller preset, or more --memory"
        )
    _require_comparable(factors, runs)
    device = traces[0].meta["device"]
    return Grid(
        target=traces[0].meta["target"],
        device=device["name"],
        predicted=device["simulated"],
        factors=tuple(factor.spec for factor in factors),
        cells=tuple(_cell(applied, trace, samples) for applied, trace in runs),
        samples=samples,
        memory_bytes=memory_bytes,
        limit_bytes=_allocatable(traces[0]) if memory_bytes is None else memory_bytes,
    )


def _require_comparable(
    factors: Sequence[SettingValue | Strategy], runs: Sequence[tuple[tuple[bool, ...], Trace | MemscopeError]]
) -> None:
    counts: dict[tuple[bool, ...], set[int | None]] = {}
    for applied, trace in runs:
        if isinstance(trace, Trace):
            values = tuple(on for on, one in zip(applied, factors, strict=True) if isinstance(one, SettingValue))
            counts.setdefault(values, set()).add(trace.meta.get("samples_per_step"))
    for found in counts.values():
        if len(found) > 1:
            raise UsageError(
                f"the runs process different numbers of samples per step ({found}): they cannot be compared"
            )


def _steps(samples: int, per_step: int) -> int:
    return -(-samples // per_step)


def _allocatable(trace: Trace) -> int | None:
    capacity = trace.meta.get("capacity")
    return None if capacity is None else int(capacity - trace.meta.get("context", 0))


def _cell(applied: tuple[bool, ...], trace: Trace | MemscopeError, samples: int) -> Cell:
    if isinstance(trace, OutOfDeviceMemory):
        return Cell(applied, fits=False, allocated_bytes=None, reserved_bytes=None, seconds=None)
    if isinstance(trace, MemscopeError):
        return Cell(applied, None, allocated_bytes=None, reserved_bytes=None, seconds=None, failure=str(trace))
    fits = not trace.meta.get("out_of_memory")
    known = fits or trace.meta["device"]["simulated"]
    step_seconds = last_step_seconds(trace) if fits else None
    per_step = trace.meta.get("samples_per_step")
    return Cell(
        applied,
        fits=fits,
        allocated_bytes=trace.peak.allocated_bytes if known else None,
        reserved_bytes=int(trace.meta["peak_reserved"]) if known and trace.reserved.size else None,
        seconds=None if step_seconds is None or not per_step else step_seconds * _steps(samples, per_step),
        samples_per_step=per_step,
    )
