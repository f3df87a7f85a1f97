"""Checkpoint plans for one combination of strategies, each simulated before it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from memscope.advisor.advice import Certificate
from memscope.advisor.measure.costs import LayerCosts, measure
from memscope.advisor.measure.layers import LayerList, layer_plan
from memscope.advisor.measure.probe import rounded
from memscope.advisor.measure.reference import Reference
from memscope.advisor.measure.runner import Asker, Probe, Seen, require
from memscope.advisor.plan.chain import Chain
from memscope.advisor.plan.planner import CheckpointPlan, NothingFits, evaluate, front, minimum_budget, plan
from memscope.allocator.settings import AllocatorSettings
from memscope.simulation.device_memory import SMALL_SEGMENT_BYTES
from memscope.simulation.devices.catalogue import Device
from memscope.strategies.ckpt import LayerPlan

__all__ = ["Found", "Planning", "device_bytes", "fits"]

_FRONT_PLANS = 4
"""Simulated plans on the Pareto front of memory against time."""
_MOST_ROUNDS = 6
_STRIDE = 4
"""The plan that is tried beside another is for a budget that is smaller by this part of the bytes that were lacking."""


@dataclass(frozen=True)
class Found:
    """A plan that was simulated."""

    strategies: str
    layers: LayerPlan | None
    """None: nothing is checkpointed."""
    seen: Seen
    seconds: float
    """Estimated time of a step."""
    certificate: Certificate | None = None
    """How far from the fastest the plan may be; None for plans that are made for other budgets."""


def fits(seen: Seen) -> bool:
    """Whether a simulated run did not run out of memory."""
    return seen.trace.meta["out_of_memory"] is None


def device_bytes(seen: Seen) -> int:
    """Bytes that the device must hold for a simulated run: peak reserved bytes and CUDA context."""
    return int(seen.trace.meta["peak_reserved"] + seen.trace.meta["context"])


@dataclass
class Planning:
    """Plans checkpoints; strategies that do not change the layers share their measured costs."""

    ask: Asker
    layers: LayerList
    device: Device
    allocator: AllocatorSettings
    budget_bytes: int
    refused: list[str] = field(default_factory=list)
    """Sentences on plans whose predicted peak is wrong even after their simulation corrected the costs."""
    _costs: dict[str, LayerCosts] = field(default_factory=dict)

    @property
    def _limit(self) -> int:
        """Bytes that the allocator may reserve."""
        return self.budget_bytes - self.device.context_bytes

    def knows(self, strategies: str) -> bool:
        """Whether the layers were measured with these strategies."""
        return strategies in self._costs

    def promise(self, reference: Reference) -> float:
        """Estimated time of a step with the cheapest plan, before its simulation; infinite if no plan fits."""
        try:
            chosen = plan(self._measured(reference).chain(), self._limit)
        except NothingFits:
            return math.inf
        return reference.none_seconds + chosen.nanoseconds / 1e9

    def within(self, reference: Reference, *, look_ahead: bool = False) -> Found | None:
        """The cheapest plan that fits the budget; None if no plan does.

        The simulation of a plan must show the predicted peak, to the byte. If it shows another peak, it corrects the
        costs, and the planner plans again. If the allocated bytes fit but the reserved bytes do not, the planner gets a
        smaller budget; a parallel runner tries the next smaller budget at the same time.

        Args:
            reference: the strategies.
            look_ahead: with the first plan, also simulate the plans that `least` and `between` ask for.
        """
        costs = self._measured(reference)
        allowed, lack, whole = self._limit, 0, False
        at_once = self.ask.runner.width > 1
        ahead = self._ahead(reference) if look_ahead and at_once else []
        for _ in range(_MOST_ROUNDS):
            plans = _affordable(costs.chain(), [allowed, allowed - lack // _STRIDE] if lack and at_once else [allowed])
            if not plans:
                return None
            tried = self._simulated(reference, plans, ahead, whole=whole)
            ahead = []
            fitting = next((index for index, (_, seen) in enumerate(tried) if fits(seen)), len(plans) - 1)
            chosen, (layers, seen) = plans[fitting], tried[fitting]
            peak = _rounded_peak(seen)
            if peak != chosen.peak_bytes:
                costs = self._costs[reference.strategies] = costs.settle(layers, seen)
                expected = evaluate(costs.chain(), chosen.choices).peak_bytes
                if expected != peak:
                    self.refused.append(
                        f"{reference.strategies or 'no strategy'}: a checkpoint plan was predicted to peak at "
                        f"{expected} bytes, its simulation shows {peak}: refused"
                    )
                    return None
            elif not fits(seen):
                lack = max(seen.least_reserved(self.allocator) - self._limit, SMALL_SEGMENT_BYTES)
                allowed, whole = peak - lack, True
            elif not whole:
                allowed, whole = peak, True  # the deciding micro-batches fit: now run all of them
            else:
                return self.certified(reference, _found(reference, chosen, layers, seen))
        return None

    def least(self, reference: Reference) -> Found:
        """The plan with the least reserved bytes that is known.

        The least allocated bytes need not be the least reserved bytes: one option for all layers fragments memory less.
        So this is the better of the planner's plan and of checkpointing every layer.
        """
        costs = self._measured(reference)
        for _ in range(_MOST_ROUNDS):
            chosen = _leanest(costs.chain())
            ((layers, seen),) = self._simulated(reference, [chosen], whole=False)
            if _rounded_peak(seen) == chosen.peak_bytes:
                break
            costs = self._costs[reference.strategies] = costs.settle(layers, seen)
        planned = _found(reference, chosen, layers, seen)
        if not reference.layers.may_recompute_all:
            return planned
        full = Found(reference.strategies, reference.layers.checkpointed, reference.full, reference.full_seconds)
        return min(planned, full, key=lambda found: found.seen.least_reserved(self.allocator))

    def certified(self, reference: Reference, found: Found) -> Found:
        """A plan with its certificate: it is held against the fastest plan whose allocated bytes fit the budget."""
        fastest = plan(self._measured(reference).chain(), self._limit)
        times = (fastest.nanoseconds, fastest.lower_bound_nanoseconds)
        seconds = [reference.none_seconds + nanoseconds / 1e9 for nanoseconds in times]
        return replace(found, certificate=Certificate.of(found.seconds, *seconds))

    def between(self, reference: Reference) -> list[Found]:
        """Plans for budgets from the smallest feasible one to that of no checkpointing."""
        plans = front(self._measured(reference).chain(), _FRONT_PLANS)
        tried = self._simulated(reference, plans, whole=False, what="plans for other budgets")
        return [_found(reference, chosen, layers, seen) for chosen, (layers, seen) in zip(plans, tried, strict=True)]

    def _measured(self, reference: Reference) -> LayerCosts:
        if reference.strategies not in self._costs:
            alike = next((c for c in self._costs.values() if c.reference.is_alike(reference)), None)
            self._costs[reference.strategies] = (
                LayerCosts(reference, alike.measured)
                if alike
                else measure(lambda probes: self.ask("options of the layers", probes), reference, self.device)
            )
        return self._costs[reference.strategies]

    def _ahead(self, reference: Reference) -> list[CheckpointPlan]:
        chain = self._measured(reference).chain()
        return [_leanest(chain), *front(chain, _FRONT_PLANS)]

    def _simulated(
        self,
        reference: Reference,
        plans: Sequence[CheckpointPlan],
        ahead: Sequence[CheckpointPlan] = (),
        *,
        whole: bool,
        what: str = "the plan",
    ) -> list[tuple[LayerPlan, Seen]]:
        """Each plan with its simulation; the plans `ahead` are simulated too, for later use."""
        layers = [_layers_of(reference, chosen) for chosen in plans]
        probes = [self.probe(reference.strategies, one, whole=whole) for one in layers]
        later = [self.probe(reference.strategies, _layers_of(reference, chosen), whole=False) for chosen in ahead]
        answers = self.ask(what, [*probes, *later])
        return [(one, require(answer)) for one, answer in zip(layers, answers, strict=False)]

    def probe(self, strategies: str, layers: LayerPlan | None, *, whole: bool) -> Probe:
        """The simulation of a plan on a device with the budget's memory."""
        return Probe(
            strategies,
            layers if layers and set(layers.layers.values()) != {"none"} else None,
            calls_of=self.layers.names,
            whole=whole,
            capacity_bytes=self.budget_bytes,
        )


def _affordable(chain: Chain, budgets: Sequence[int]) -> list[CheckpointPlan]:
    """The cheapest plan for each budget, largest budget first, up to the first budget that is not feasible."""
    plans: list[CheckpointPlan] = []
    for budget_bytes in budgets:
        try:
            plans.append(plan(chain, budget_bytes))
        except NothingFits:
            break
    return plans


def _leanest(chain: Chain) -> CheckpointPlan:
    return plan(chain, minimum_budget(chain))


def _layers_of(reference: Reference, chosen: CheckpointPlan) -> LayerPlan:
    return layer_plan(reference.layers.names, [(choice.option, choice.length) for choice in chosen.choices])


def _found(reference: Reference, chosen: CheckpointPlan, layers: LayerPlan, seen: Seen) -> Found:
    return Found(
        strategies=reference.strategies,
        layers=layers,
        seen=seen,
        seconds=reference.none_seconds + chosen.nanoseconds / 1e9,
    )


def _rounded_peak(seen: Seen) -> int:
    """Peak allocated bytes as the planner counts them: of rounded requests, without the slack in blocks."""
    return replace(seen.trace, size=rounded(seen.trace)).peak.allocated_bytes
