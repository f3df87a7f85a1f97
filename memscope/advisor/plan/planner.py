"""Plan which layers to checkpoint, and how, so that a training step fits a budget in the least time.

docs/design/0003-how-a-checkpoint-plan-is-found.md explains how plans are found, and why a smaller budget never yields a
larger peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

from memscope.advisor.plan.chain import Chain, Choice, Evaluation, evaluate
from memscope.advisor.plan.labels import TooManyLabels
from memscope.advisor.plan.search import PlanSearch
from memscope.errors import GateFailed, MemscopeError
from memscope.units import format_bytes

__all__ = [
    "Chain",
    "CheckpointPlan",
    "Choice",
    "Evaluation",
    "NothingFits",
    "evaluate",
    "front",
    "minimum_budget",
    "plan",
]


class NothingFits(GateFailed):
    """No sequence of choices fits the budget."""

    def __init__(self, budget_bytes: int, minimum_bytes: int, binding: str) -> None:
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        """The smallest feasible budget."""
        self.binding = binding
        """Where the peak of the plan for that budget is, as in `Evaluation`."""
        super().__init__(
            f"no checkpoint plan fits a budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes): the smallest "
            f"feasible budget is {format_bytes(minimum_bytes)} ({minimum_bytes} bytes), where the peak is: {binding}"
        )


@dataclass(frozen=True)
class CheckpointPlan:
    """The fastest choices that fit a budget, with a certificate."""

    choices: tuple[Choice, ...]
    """In order of the layers; they cover every layer."""
    nanoseconds: int
    """Time they add to a step."""
    peak_bytes: int
    """Peak allocated bytes: the largest left side of all constraints."""
    binding: str
    """Where the peak is, as in `Evaluation`."""
    budget_bytes: int
    lower_bound_nanoseconds: int
    """No plan that fits the budget adds less."""

    @property
    def first_layers(self) -> tuple[int, ...]:
        """The first layer of each choice."""
        return tuple(accumulate((choice.length for choice in self.choices[:-1]), initial=0))

    @property
    def gap(self) -> float:
        """How much slower than the fastest the plan may be, as a part of the lower bound; 0: it is the fastest."""
        if self.nanoseconds == self.lower_bound_nanoseconds:
            return 0.0
        return self.nanoseconds / self.lower_bound_nanoseconds - 1 if self.lower_bound_nanoseconds else math.inf


def plan(chain: Chain, budget_bytes: int) -> CheckpointPlan:
    """Find the fastest plan that fits a budget; of equally fast plans, one with the least peak.

    The plan is exact (`gap` 0), unless very many plans are nearly as fast as the best one. That takes dozens of layers
    that all differ, with times in proportion to sizes. The search then rounds times, and the gap is certified. Either
    way, a smaller budget never yields a larger peak.

    Raises:
        NothingFits: with the smallest feasible budget.
        MemscopeError: when the search outgrows its memory at this budget.
    """
    return _planned(PlanSearch.easy(chain), budget_bytes)


def front(chain: Chain, points: int = 6) -> tuple[CheckpointPlan, ...]:
    """Plans for budgets evenly spread from the smallest feasible budget to the peak of the fastest plan of all.

    No plan beats another in time and peak. There are fewer than `points` where one plan is best for several budgets.

    Raises:
        ValueError: when fewer than two points are asked for.
    """
    if points < 2:
        raise ValueError(f"a front of {points} points: expected 2 or more")
    search = PlanSearch.easy(chain)
    low, high = search.least_bytes, _planned(search, chain.most_bytes).peak_bytes
    budgets = [low + (high - low) * point // (points - 1) for point in range(points)]
    plans = {found.peak_bytes: found for found in (_planned(search, budget_bytes) for budget_bytes in budgets)}
    return tuple(plans[peak_bytes] for peak_bytes in sorted(plans))


def minimum_budget(chain: Chain) -> int:
    """The smallest feasible budget, in bytes."""
    return PlanSearch(chain).least_bytes


def _planned(search: PlanSearch, budget_bytes: int) -> CheckpointPlan:
    if budget_bytes < search.least_bytes:
        least = replace(search, widths=(1,)).fastest(search.least_bytes)
        assert least is not None
        raise NothingFits(budget_bytes, search.least_bytes, least.cost.binding)
    enough = min(budget_bytes, search.chain.most_bytes)
    try:
        fastest = search.fastest(enough)
        assert fastest is not None
        leanest = search.leanest(fastest)
    except TooManyLabels:
        raise MemscopeError(
            f"too many plans for a budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes) are nearly as fast as "
            "each other: try another budget, or round the times of the choices to fewer digits"
        ) from None
    cost, bound = leanest.cost, search.lower_bound(enough, fastest)
    return CheckpointPlan(leanest.choices, cost.nanoseconds, cost.peak_bytes, cost.binding, budget_bytes, bound)
