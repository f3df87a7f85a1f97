"""The two questions behind a plan: how fast can it be within a budget, and how little memory does that time take?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from memscope.advisor.plan.bounds import Needs, TimeBound, needs_of
from memscope.advisor.plan.chain import Chain, Choice, Evaluation, evaluate
from memscope.advisor.plan.graph import Graph, Node
from memscope.advisor.plan.labels import TooManyLabels, best_path

__all__ = ["PlanSearch", "Solution"]

_WIDTHS = (100, 3000, None)
_MOST_LABELS, _MOST_TO_BE_EASY = 500_000, 10_000
_PROBES = 4
_MOST_BITS = 11
"""Rounds times by less than a 2000th at first, which makes plans less than a thousandth slower."""


@dataclass(frozen=True)
class Solution:
    """A sequence of choices, and its cost."""

    choices: tuple[Choice, ...]
    cost: Evaluation
    rounded_nanoseconds: int
    """Its time with the times of its choices rounded."""


@dataclass(frozen=True)
class PlanSearch:
    """Searches for the plans of one chain."""

    chain: Chain
    bits: int | None = None
    """Significant bits to which the time of each choice is rounded; None: times are exact."""
    widths: tuple[int | None, ...] = _WIDTHS
    """Most labels a state may have in each search, one after the other. None: no limit, so the search is exact."""
    most_labels: int = _MOST_LABELS
    """Labels of one state at which an exact search gives up."""

    @classmethod
    def easy(cls, chain: Chain) -> PlanSearch:
        """A search that rounds times only as far as it must to stay small; that depends on the chain alone."""
        searches = (cls(chain, bits) for bits in (None, *range(_MOST_BITS, 1, -1)))
        return next((search for search in searches if search._is_easy), cls(chain, 1))

    @cached_property
    def rounded(self) -> Chain:
        """The chain with rounded times."""
        if self.bits is None:
            return self.chain
        return replace(self.chain, choices=tuple(tuple(map(self._round, choices)) for choices in self.chain.choices))

    @cached_property
    def graph(self) -> Graph:
        """The choices, with rounded times, as a graph."""
        return Graph.of(self.rounded)

    @cached_property
    def needs(self) -> dict[Node, Needs]:
        """Bytes that the rest of a plan needs from each state on."""
        return needs_of(self.graph)

    @cached_property
    def least_bytes(self) -> int:
        """The least peak of all plans."""
        return max(self.chain.fixed_bytes, self.needs[self.graph.start].least_bytes)

    def fastest(self, budget_bytes: int, limit: float = math.inf) -> Solution | None:
        """The fastest plan that fits a budget and takes at most `limit` rounded nanoseconds; None if no plan does.

        Raises:
            TooManyLabels: when too many plans are nearly as fast.
        """
        bound = TimeBound.of(self.graph, budget_bytes)
        best: Solution | None = None
        for width in self.widths:
            path, is_complete = best_path(
                self.graph, self.needs, bound, budget_bytes,
                limit_nanoseconds=limit, width=width, most_labels=self.most_labels,
            )  # fmt: skip
            if path is not None:
                best = self._solution(path)
                limit = best.rounded_nanoseconds - 1
            if is_complete:
                break
        return best

    def leanest(self, start: Solution) -> Solution:
        """The plan with the least peak among those that take no longer than `start`.

        The peak is lowered in strides that double until no plan is left, then by bisection.

        Raises:
            TooManyLabels: when too many plans are nearly as fast.
        """
        best, low, stride, is_found = start, self.least_bytes, 1, True
        while low < best.cost.peak_bytes:
            budget_bytes = max(low, best.cost.peak_bytes - stride)
            found = self.fastest(budget_bytes, start.rounded_nanoseconds)
            if found is None:
                low, is_found = budget_bytes + 1, False
            else:
                best = found
            stride = 2 * stride if is_found else max(1, (best.cost.peak_bytes - low) // 2)
        return best

    def lower_bound(self, budget_bytes: int, fastest: Solution) -> int:
        """Nanoseconds, not rounded, that every plan takes which fits the budget; `fastest` is the fastest of them."""
        if self.bits is None:
            return fastest.cost.nanoseconds
        bound = TimeBound.of(Graph.of(self.chain), budget_bytes)
        return max(0, math.ceil(bound.nanoseconds - bound.error))

    @cached_property
    def _is_easy(self) -> bool:
        """Whether searches stay small, tried at budgets from the least peak to that of the fastest plan of all."""
        probe = replace(self, most_labels=_MOST_TO_BE_EASY)
        try:
            highest = probe.fastest(self.chain.most_bytes)
            assert highest is not None
            span = max(0, highest.cost.peak_bytes - self.least_bytes)
            for part in range(1, _PROBES):
                probe.fastest(self.least_bytes + span * part // _PROBES)
        except TooManyLabels:
            return False
        return True

    def _round(self, choice: Choice) -> Choice:
        assert self.bits is not None
        unit = 1 << max(0, choice.nanoseconds.bit_length() - self.bits)
        return replace(choice, nanoseconds=(choice.nanoseconds + unit // 2) // unit * unit)

    def _solution(self, path: Sequence[tuple[int, int]]) -> Solution:
        choices = tuple(self.chain.choices[layer][index] for layer, index in path)
        rounded = sum(self.rounded.choices[layer][index].nanoseconds for layer, index in path)
        return Solution(choices, evaluate(self.chain, choices), rounded)
