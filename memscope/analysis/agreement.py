"""Compare predictions with measurements: simulated and measured runs of the same plan, category by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memscope.analysis.effects import Run
from memscope.analysis.ledger import ledger
from memscope.trace import CATEGORIES, Trace

__all__ = ["Agreement", "Compared", "agreements"]


@dataclass(frozen=True)
class Compared:
    """One figure of both runs, in bytes."""

    name: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Error of the prediction as a fraction of the measurement; infinite if only the prediction is not zero."""
        if self.measured:
            return (self.predicted - self.measured) / self.measured
        return float("inf") if self.predicted else 0.0

    def __str__(self) -> str:
        return "new" if self.error == float("inf") else f"{self.error:+.2%}"


@dataclass(frozen=True)
class Agreement:
    """A simulated and a measured run of the same target, settings and strategies, each at its own peak."""

    predicted: str
    """Label of the simulated run."""
    measured: str
    """Label of the measured run."""
    figures: tuple[Compared, ...]
    """The categories that either run has, then allocated bytes and, if known, reserved bytes and the driver's count."""


def agreements(runs: Sequence[Run]) -> tuple[Agreement, ...]:
    """Pair every simulated run with every measured run of the same plan."""
    found = []
    for predicted in runs:
        for measured in runs:
            kinds = _kind(predicted.trace), _kind(measured.trace)
            if kinds == ("simulated", "measured") and _plan(predicted) == _plan(measured):
                figures = _figures(predicted.trace, measured.trace)
                found.append(Agreement(predicted.label, measured.label, figures))
    return tuple(found)


def _kind(trace: Trace) -> str:
    """`simulated` or `measured`; empty if the trace does not say, or was recorded by another tool."""
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
