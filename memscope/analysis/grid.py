"""Table 2: every combination of some strategies, each on or off, with the memory it needs and the time a run takes.

All combinations process the same samples a step: a strategy that changes how they are processed says what the run
without it is (`Strategy.baseline`), such as the same effective batch in one go without gradient accumulation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memscope.analysis.cost import last_step_seconds
from memscope.errors import OutOfDeviceMemory, UsageError
from memscope.strategies import Plan, Strategy
from memscope.trace import Trace

__all__ = ["Cell", "Grid", "combinations", "table2"]


@dataclass(frozen=True)
class Cell:
    """One combination."""

    applied: tuple[bool, ...]
    """Which of the grid's factors, in their order."""
    fits: bool
    allocated_bytes: int | None
    """Most memory allocated. Where it does not fit: what it would need, if that was simulated; else None."""
    reserved_bytes: int | None
    """The same of reserved memory; None also where there is no allocator to reserve any."""
    seconds: float | None
    """What the run of all samples takes; None where it does not fit, or that is not known."""


@dataclass(frozen=True)
class Grid:
    """Table 2: a cell for each combination, the one without any strategy first."""

    target: str
    device: str
    predicted: bool
    """True: memory is simulated and time an estimate. False: both were measured."""
    factors: tuple[str, ...]
    """Strategies with their settings, as a plan writes them."""
    cells: tuple[Cell, ...]
    samples: int
    memory_bytes: int | None
    """Most that PyTorch could take of the GPU where that was limited; else None."""
    limit_bytes: int | None
    """`memory_bytes`, or what the device has, less its context where that is known; None on the CPU."""
    samples_per_step: int | None
    """None where the samples of a batch cannot be counted: then there is no time."""

    @property
    def steps(self) -> int | None:
        """Optimizer steps that the samples take; the last one is whole, too."""
        return None if not self.samples_per_step else -(-self.samples // self.samples_per_step)


def combinations(factors: Sequence[Strategy]) -> list[tuple[tuple[bool, ...], Plan]]:
    """Which factors each combination applies, and its plan: first none, last all; the first factor changes last.

    Raises:
        UsageError: when there is no factor, one is there twice, or a combination of them cannot be used.
    """
    if not factors:
        raise UsageError("the grid has no strategy: name those to combine, for example --grid ga,amp,lora")
    Plan.of(*factors)
    choices = itertools.product((False, True), repeat=len(factors))
    return [(applied, Plan.of(*itertools.compress(factors, applied))) for applied in choices]


def table2(
    factors: Sequence[Strategy],
    runs: Sequence[tuple[tuple[bool, ...], Trace | None]],
    samples: int,
    memory_bytes: int | None = None,
) -> Grid:
    """Table 2 of the traces of all combinations; None stands for a run that had no room even for the weights.

    A run's time is that of its last step, measured or estimated, times the steps that `samples` take.

    Raises:
        OutOfDeviceMemory: when no run has a trace.
        UsageError: when runs differ in the samples of a step, so that they cannot be compared.
    """
    traces = [trace for _, trace in runs if trace is not None]
    if not traces:
        raise OutOfDeviceMemory(
            "no combination has room for the weights: choose a larger device, a smaller preset, or more --memory"
        )
    counts = {trace.meta.get("samples_per_step") for trace in traces}
    if len(counts) > 1:
        raise UsageError(f"the runs process different numbers of samples a step ({counts}): they cannot be compared")
    device = traces[0].meta["device"]
    empty = Grid(
        target=traces[0].meta["target"],
        device=device["name"],
        predicted=device["simulated"],
        factors=tuple(factor.spec for factor in factors),
        cells=(),
        samples=samples,
        memory_bytes=memory_bytes,
        limit_bytes=_allocatable(traces[0]) if memory_bytes is None else memory_bytes,
        samples_per_step=counts.pop(),
    )
    return replace(empty, cells=tuple(_cell(applied, trace, empty.steps) for applied, trace in runs))


def _allocatable(trace: Trace) -> int | None:
    capacity = trace.meta.get("capacity")
    return None if capacity is None else int(capacity - trace.meta.get("context", 0))


def _cell(applied: tuple[bool, ...], trace: Trace | None, steps: int | None) -> Cell:
    if trace is None:
        return Cell(applied, fits=False, allocated_bytes=None, reserved_bytes=None, seconds=None)
    fits = not trace.meta.get("out_of_memory")
    known = fits or trace.meta["device"]["simulated"]
    step_seconds = last_step_seconds(trace) if fits else None
    return Cell(
        applied,
        fits=fits,
        allocated_bytes=trace.peak.allocated_bytes if known else None,
        reserved_bytes=int(trace.meta["peak_reserved"]) if known and trace.reserved.size else None,
        seconds=None if step_seconds is None or steps is None else step_seconds * steps,
    )
