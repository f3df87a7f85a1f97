"""A prediction held against a measurement: a simulated and a measured run of the same plan, category by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memscope.analysis.effects import Run
from memscope.analysis.ledger import ledger
from memscope.trace import CATEGORIES, Trace

__all__ = ["Agreement", "Compared", "agreements"]


@dataclass(frozen=True)
class Compared:
    """One number of both runs, in bytes."""

    name: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the measurement; infinite where nothing was measured."""
        if self.measured:
            return (self.predicted - self.measured) / self.measured
        return float("inf") if self.predicted else 0.0

    def __str__(self) -> str:
        return "new" if self.error == float("inf") else f"{self.error:+.2%}"


@dataclass(frozen=True)
class Agreement:
    """A simulated run and a measured one of the same target, settings and strategies, each at its own peak."""

    predicted: str
    """Label of the simulated run."""
    measured: str
    figures: tuple[Compared, ...]
    """The categories that one of them has; then what is allocated, reserved, and seen by the driver, where known."""


def agreements(runs: Sequence[Run]) -> tuple[Agreement, ...]:
    """Every simulated run of several with every measured run of the same plan."""
    found = []
    for predicted in runs:
        for measured in runs:
            kinds = _kind(predicted.trace), _kind(measured.trace)
            if kinds == ("simulated", "measured") and _plan(predicted) == _plan(measured):
                figures = _figures(predicted.trace, measured.trace)
                found.append(Agreement(predicted.label, measured.label, figures))
    return tuple(found)


def _kind(trace: Trace) -> str:
    """How a trace came to be; empty when it does not say, and for what another tool recorded."""
    match trace.meta:
        case {"imported": _}:
            return ""
        case {"device": {"simulated": bool(simulated)}}:
            return "simulated" if simulated else "measured"
    return ""


def _plan(run: Run) -> tuple[object, ...]:
    return tuple(run.trace.meta.get(name) for name in ("target", "settings", "strategies"))


def _figures(predicted: Trace, measured: Trace) -> tuple[Compared, ...]:
    before, after = predicted.by_category(), measured.by_category()
    figures = [Compared(name, before[name], after[name]) for name in CATEGORIES if before[name] or after[name]]
    figures.append(Compared("allocated", predicted.peak.allocated_bytes, measured.peak.allocated_bytes))
    ours, theirs = ledger(predicted), ledger(measured)
    if ours and theirs:
        for name in ("reserved", "device"):
            one, other = ours.total(name), theirs.total(name)
            if one is not None and other is not None:
                figures.append(Compared(name, one, other))
    return tuple(figures)
