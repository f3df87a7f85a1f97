"""The advice: the plan, its peak and time, its certificate, and the other plans worth considering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memscope.trace import PHASES, Trace
from memscope.units import format_bytes, format_seconds

__all__ = ["Advice", "Binding", "Certificate", "FrontPoint", "PlanPeak", "binding_of", "in_words", "short_option"]

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
    strategies: tuple[str, ...]
    """Strategies with their settings, without checkpointing."""
    layers: Mapping[str, str]
    """Option of each layer; empty if nothing is checkpointed."""
    peak: PlanPeak
    """Of the plan; where nothing fits, of the plan that needs least."""
    step_seconds: float
    overhead_vs_none: float
    """Extra step time over no checkpointing, as a share: 0.12 is 12 %."""
    overhead_vs_all: float
    """Extra step time over checkpointing every layer; negative if shorter."""
    certificate: Certificate | None
    minimum_bytes: int
    """The smallest feasible budget, of the plans found."""
    binding: Binding
    front: tuple[FrontPoint, ...]
    simulated: int
    """Number of combinations of strategies simulated."""
    combinations: int
    """Number of all combinations of strategies."""
    notes: tuple[str, ...] = ()
    """Further sentences for the user."""
    made_for: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The workload and device of the plan, as a plan file records them."""
    file: Path | None = None
    """Plan file, once saved."""
    trace: Trace | None = field(default=None, repr=False)
    """The whole step with the plan, simulated."""

    @property
    def optimality(self) -> str:
        """What the certificate proves, as a sentence; empty where nothing fits."""
        if self.certificate is None:
            return ""
        if not self.layers:
            return "nothing is recomputed: no checkpoint plan is faster with these strategies"
        proven, extra = self.certificate, self.peak.reserved - self.peak.allocated
        search = "exact" if proven.search_gap == 0 else f"within {proven.search_gap:.2%}"
        slower = f"{proven.fragmentation_gap:.2%}" if proven.fragmentation_gap else "nothing"
        return (
            f"{search} for allocated bytes: with these strategies, no checkpoint plan of the options considered that "
            f"fits takes less than {format_seconds(proven.lower_bound_seconds)} (estimate); fragmentation, "
            f"{format_bytes(extra)} reserved beyond allocated, adds {slower}"
        )

    @property
    def plan(self) -> str:
        """The plan as `memscope profile -s` takes it."""
        words = [*self.strategies, *([f"ckpt:plan={self.file}"] if self.file else [])]
        return ",".join(words)

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
            },
            "peak": self.peak.document(),
            "time": {
                "estimate": True,
                "step_seconds": self.step_seconds,
                "overhead_vs_none": self.overhead_vs_none,
                "overhead_vs_all": self.overhead_vs_all,
            },
            "certificate": self.certificate.document() if self.certificate else None,
            "minimum_budget": self.minimum_bytes,
            "binding": self.binding.document(),
            "front": [point.document() for point in self.front],
            "combinations": {"simulated": self.simulated, "all": self.combinations},
            "notes": list(self.notes),
        }


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


def in_words(layers: Mapping[str, str]) -> str:
    """The options of the layers, with equal neighbours as ranges: `layers.0-15 full, layers.16-31 none`."""
    spans: list[tuple[str, str, str]] = []
    for name, option in layers.items():
        if option.startswith("within:"):
            option = spans[-1][2]
        if spans and spans[-1][2] == option:
            spans[-1] = (spans[-1][0], name, option)
        else:
            spans.append((name, name, option))
    if not spans or {option for _, _, option in spans} == {"none"}:
        return "nothing"
    words = (f"{_range(first, last)} {short_option(option)}" for first, last, option in spans)
    return ", ".join(words)


def short_option(option: str) -> str:
    """An option in short: `save:attention.wq/aten.mm+attention.wk/aten.mm` is `save wq+wk`."""
    kind, _, rest = option.partition(":")
    if kind != "save":
        return option.replace(":", " ")
    calls = [call.partition("/") for call in rest.split("+")]
    return f"{kind} {'+'.join(module.rpartition('.')[2] or op.rpartition('.')[2] for module, _, op in calls)}"


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}-{last.rpartition('.')[2]}"
