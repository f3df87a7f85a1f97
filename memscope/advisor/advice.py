"""The advice: the plan, its peak and time, its certificate, and the other plans worth considering."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from memscope.analysis.fit import Fit
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.ckpt import Checkpoint, LayerPlan
from memscope.trace import PHASES, Trace
from memscope.units import format_both, format_bytes, format_seconds

__all__ = ["Advice", "Binding", "Certificate", "FrontPoint", "PlanPeak", "binding_of", "unbeaten"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlanPeak:
    """The peak of a plan, in bytes."""

    allocated: int
    """As `torch.cuda.max_memory_allocated` reports it."""
    reserved: int
    """The least that PyTorch's allocator must be able to reserve for the plan to run."""
    device: int
    """Reserved bytes and CUDA context, which the device must hold. The context is an estimate."""

    def document(self) -> dict[str, int]:
        """As JSON values."""
        return {"allocated": self.allocated, "reserved": self.reserved, "device": self.device}


@dataclass(frozen=True)
class Certificate:
    """How far a plan may be from the fastest one: among checkpoint plans of the options considered, for its strategies.

    All times are estimates; gaps are parts of the plan's step time.
    """

    lower_bound_seconds: float
    """No such plan whose allocated bytes fit the budget makes a step shorter than this."""
    search_gap: float
    """From the lower bound to the fastest plan found whose allocated bytes fit; 0: the planner's search was exact."""
    fragmentation_gap: float
    """From there to this plan, whose reserved bytes fit too."""

    @classmethod
    def of(cls, seconds: float, fastest_seconds: float, lower_bound_seconds: float) -> Certificate:
        """From the step times of the plan, of the fastest plan found whose allocated bytes fit, and of the bound."""
        fastest = min(fastest_seconds, seconds)
        return cls(lower_bound_seconds, (fastest - lower_bound_seconds) / seconds, 1 - fastest / seconds)

    @property
    def gap(self) -> float:
        """From the lower bound to this plan."""
        return self.search_gap + self.fragmentation_gap

    def scaled(self, factor: float) -> Certificate:
        """The same certificate, for times that are `factor` times as long."""
        return replace(self, lower_bound_seconds=self.lower_bound_seconds * factor)

    def document(self) -> dict[str, float]:
        """As JSON values."""
        return {**vars(self), "gap": self.gap}


@dataclass(frozen=True)
class Binding:
    """The event at the peak of a plan."""

    step: int
    phase: str
    module: str
    op: str
    allocated: int
    by_category: Mapping[str, int]
    helps: str = ""
    """Strategies that would lower the peak."""

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "by_category": dict(self.by_category)}


@dataclass(frozen=True)
class FrontPoint:
    """A simulated plan on the Pareto front of memory against time."""

    strategies: tuple[str, ...]
    recomputed: str
    """Its checkpointing, in words."""
    peak: PlanPeak
    step_seconds: float

    def is_same_plan(self, other: FrontPoint) -> bool:
        """Whether both are the same plan."""
        return (self.strategies, self.recomputed) == (other.strategies, other.recomputed)

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "strategies": list(self.strategies),
            "recomputed": self.recomputed,
            "peak": self.peak.document(),
            "step_seconds": self.step_seconds,
        }


@dataclass(frozen=True)
class Advice:
    """The cheapest plan found that fits a budget, or why no plan does. Times are estimates."""

    target: str
    device: str
    budget_bytes: int
    feasible: bool
    """Whether a plan was found that fits. If not, all figures are those of the simulated plan that needs least."""
    strategies: tuple[str, ...]
    """Strategies with their settings, without checkpointing."""
    layers: Mapping[str, str]
    """Option of each layer; empty if nothing is checkpointed."""
    peak: PlanPeak
    """Of the plan, simulated as a whole on the device with the budget's memory."""
    step_seconds: float
    """Of the same simulation, with every micro-batch."""
    overhead_vs_none: float
    """Extra step time over no checkpointing, as a share: 0.12 is 12 %."""
    overhead_vs_all: float | None
    """Extra step time over checkpointing every layer; negative if shorter; None if no layers can be checkpointed."""
    certificate: Certificate | None
    minimum_bytes: int
    """The least that a simulated plan needs: a budget of this size is enough."""
    binding: Binding
    front: tuple[FrontPoint, ...]
    simulated: int
    """Number of combinations of strategies simulated."""
    combinations: int
    """Number of all combinations of strategies."""
    untried: tuple[str, ...] = ()
    """Combinations that may hold a cheaper plan, or one that fits where none was found, and were not tried."""
    notes: tuple[str, ...] = ()
    """Further sentences for the user, those of the plan's trace included."""
    made_for: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The workload and device of the plan, as a plan file records them."""
    file: Path | None = None
    """Plan file, once saved."""
    trace: Trace | None = field(default=None, repr=False)
    """The whole step with the plan, simulated."""
    fitting: tuple[tuple[str, FrontPoint], ...] = field(default=(), repr=False)
    """Simulated plans that fit, by estimated step time, each with the text that makes `-s` apply it."""

    @property
    def proof(self) -> str:
        """What is known of plans that were not chosen, and which combinations of strategies were not tried."""
        untried = f"not tried: {_listed(self.untried)}" if self.untried else "no other combination can be cheaper"
        if self.certificate is None:
            untried = untried if self.untried else "every combination was tried"
            return f"{self.simulated} of {self.combinations} combinations of strategies simulated; {untried}"
        return f"{self._optimality}. Of {self.combinations} combinations of strategies, {untried}"

    @property
    def fit(self) -> Fit:
        """How safely the plan, or the simulated plan that needs least, fits the budget."""
        return Fit.of(self.peak.reserved, self.peak.device, self.budget_bytes)

    @property
    def _optimality(self) -> str:
        if not self.layers:
            return "nothing is recomputed: no checkpoint plan is faster with these strategies"
        assert self.certificate is not None
        proven, extra = self.certificate, self.peak.reserved - self.peak.allocated
        search = "exact" if proven.search_gap == 0 else f"within {proven.search_gap:.2%}"
        slower = f"{proven.fragmentation_gap:.2%}" if proven.fragmentation_gap else "nothing"
        return (
            f"{search} for allocated bytes: with these strategies, no checkpoint plan of the options considered that "
            f"fits takes less than {format_seconds(proven.lower_bound_seconds)} (estimate); fragmentation, "
            f"{format_bytes(extra)} reserved beyond allocated, adds {slower}"
        )

    @property
    def plan(self) -> Plan | None:
        """The plan that makes the step fit, checkpoints included: `plan.apply(workload)`. None where nothing fits."""
        if not self.feasible:
            return None
        strategies = Plan.parse(",".join(self.strategies)).strategies
        checkpoint = [self._checkpoint(self.file)] if self.layers else []
        return Plan.of(*strategies, *checkpoint)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Advice:
        """Write the checkpoint plan for `ckpt:plan=FILE`, and return the advice with a `plan` that names this file.

        Without checkpoints there is nothing to write, and no file: `str(advice.plan)` is the whole plan.

        Raises:
            UsageError: when nothing fits, or the file exists and `overwrite` is False.
            TraceFileError: when it cannot be written.
        """
        if not self.feasible:
            raise UsageError(
                f"nothing to save: no plan was found that fits {format_both(self.budget_bytes)}; the least "
                f"that a simulated plan needs is {format_both(self.minimum_bytes)}"
            )
        if not self.layers:
            return self
        return replace(self, file=LayerPlan(self.layers, self.made_for).save(path, overwrite=overwrite))

    def _checkpoint(self, file: Path | None) -> Checkpoint:
        return Checkpoint.of(LayerPlan(self.layers, self.made_for), "" if file is None else str(file))

    def document(self) -> dict[str, Any]:
        """As one JSON document with integer bytes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "device": self.device,
            "budget": self.budget_bytes,
            "feasible": self.feasible,
            "plan": {
                "strategies": list(self.strategies),
                "layers": dict(self.layers),
                "file": str(self.file) if self.file else None,
            }
            if self.feasible
            else None,
            "peak": self.peak.document(),
            "fit": self.fit.document(),
            "time": {
                "estimate": True,
                "step_seconds": self.step_seconds,
                "overhead_vs_none": self.overhead_vs_none,
                "overhead_vs_all": self.overhead_vs_all,
            },
            "certificate": self.certificate.document() if self.certificate else None,
            "proof": self.proof,
            "minimum_budget": self.minimum_bytes,
            "binding": self.binding.document(),
            "front": [point.document() for point in self.front],
            "combinations": {"simulated": self.simulated, "all": self.combinations, "untried": list(self.untried)},
            "notes": list(self.notes),
        }


def unbeaten(points: Iterable[FrontPoint]) -> tuple[FrontPoint, ...]:
    """The points that no other beats in memory and time as both are printed, least memory first."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.peak.device, point.step_seconds)):
        seconds = format_seconds(point.step_seconds)
        if kept and (point.step_seconds >= kept[-1].step_seconds or seconds == format_seconds(kept[-1].step_seconds)):
            continue
        if kept and format_bytes(point.peak.device) == format_bytes(kept[-1].peak.device):
            kept.pop()
        kept.append(point)
    return tuple(kept)


def binding_of(trace: Trace, helps: str = "") -> Binding:
    """The event at a trace's peak: the module and operator that allocated, and the bytes by category."""
    peak = trace.peak
    index = int(np.flatnonzero(trace.born == peak.event)[0])
    return Binding(
        step=peak.step,
        phase=PHASES[int(trace.phase[index])],
        module=trace.modules[int(trace.module[index])],
        op=trace.ops[int(trace.op[index])],
        allocated=peak.allocated_bytes,
        by_category={category: size for category, size in trace.by_category().items() if size},
        helps=helps,
    )


def _listed(texts: Sequence[str]) -> str:
    """The first three of many texts, and the number of others."""
    words = [f'"{text}"' for text in texts]
    return ", ".join(words if len(words) <= 4 else [*words[:3], f"and {len(words) - 3} more"])
