"""Which layers to checkpoint, and how, so that a training step fits a budget in the least time.

How plans are found, and why a smaller budget never yields a larger peak, is explained in
docs/design/0003-how-a-checkpoint-plan-is-found.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

from memscope.advisor.plan.chain import Chain, Choice, Evaluation, evaluate
from memscope.advisor.plan.labels import TooManyLabels
from memscope.advisor.plan.problem import Problem
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
        """The least budget that will do."""
        self.binding = binding
        """Where the peak of a plan with that budget is, as in `Evaluation`."""
        super().__init__(
            f"no choice of checkpoints fits a budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes): the least "
            f"that will do is {format_bytes(minimum_bytes)} ({minimum_bytes} bytes); what binds there: {binding}"
        )


@dataclass(frozen=True)
class CheckpointPlan:
    """The fastest choices that fit a budget, with the proof of how good they are."""

    choices: tuple[Choice, ...]
    """In order of the layers, all of which they cover."""
    nanoseconds: int
    """Time they add to a step."""
    peak_bytes: int
    """Most that is ever allocated: the largest left side of all constraints."""
    binding: str
    """Where that is, as in `Evaluation`."""
    budget_bytes: int
    lower_bound_nanoseconds: int
    """No plan that fits the budget adds less."""

    @property
    def first_layers(self) -> tuple[int, ...]:
        """The layer with which each choice begins."""
        return tuple(accumulate((choice.length for choice in self.choices[:-1]), initial=0))

    @property
    def gap(self) -> float:
        """By what part of the lower bound the plan may be slower than the fastest; 0: it is the fastest."""
        if self.nanoseconds == self.lower_bound_nanoseconds:
            return 0.0
        return self.nanoseconds / self.lower_bound_nanoseconds - 1 if self.lower_bound_nanoseconds else math.inf


def plan(chain: Chain, budget_bytes: int) -> CheckpointPlan:
    """Find the plan that fits a budget in the least time; of those as fast, one with the least peak.

    It is exact (`gap` 0), unless very many plans are nearly as fast as the best: that takes dozens of layers that all
    differ, with times in proportion to sizes. Then times are rounded for the search, and the gap is certified. Either
    way, a smaller budget never yields a larger peak.

    Raises:
        NothingFits: with the least budget that will do.
        MemscopeError: when the search outgrows its memory at this very budget.
    """
    return _planned(Problem.easy(chain), budget_bytes)


def front(chain: Chain, points: int = 6) -> tuple[CheckpointPlan, ...]:
    """Plans for budgets evenly spread from the least possible peak to that of the fastest plan of all.

    No plan beats another in time and peak. They are fewer than `points` where one is the best for several budgets.

    Raises:
        ValueError: when fewer than two points are asked for.
    """
    if points < 2:
        raise ValueError(f"a front of {points} points: expected 2 or more")
    problem = Problem.easy(chain)
    low, high = problem.least_bytes, _planned(problem, chain.most_bytes).peak_bytes
    budgets = [low + (high - low) * point // (points - 1) for point in range(points)]
    plans = {found.peak_bytes: found for found in (_planned(problem, budget_bytes) for budget_bytes in budgets)}
    return tuple(plans[peak_bytes] for peak_bytes in sorted(plans))


def minimum_budget(chain: Chain) -> int:
    """The least budget, in bytes, that some plan fits."""
    return Problem(chain).least_bytes


def _planned(problem: Problem, budget_bytes: int) -> CheckpointPlan:
    if budget_bytes < problem.least_bytes:
        least = replace(problem, widths=(1,)).fastest(problem.least_bytes)
        assert least is not None
        raise NothingFits(budget_bytes, problem.least_bytes, least.takes.binding)
    enough = min(budget_bytes, problem.chain.most_bytes)
    try:
        fastest = problem.fastest(enough)
        assert fastest is not None
        leanest = problem.leanest(fastest)
    except TooManyLabels:
        raise MemscopeError(
            f"too many plans for a budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes) are nearly as fast as "
            "each other: try another budget, or round the times of the choices to fewer digits"
        ) from None
    takes, bound = leanest.takes, problem.lower_bound(enough, fastest)
    return CheckpointPlan(leanest.choices, takes.nanoseconds, takes.peak_bytes, takes.binding, budget_bytes, bound)
