"""The two questions behind a plan: how fast can it be within a budget, and how little memory does that take?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from memscope.advisor.bounds import TimeBound
from memscope.advisor.chain import Chain, Choice, Evaluation, evaluate
from memscope.advisor.labels import TooManyLabels, search
from memscope.advisor.moves import Graph, Node
from memscope.advisor.needs import Needs, needs_of

__all__ = ["Problem", "Solution"]

_WIDTHS = (100, 3000, None)
_MOST_LABELS, _MOST_TO_BE_EXACT = 500_000, 50_000
_PROBES = 4


@dataclass(frozen=True)
class Solution:
    """A sequence of choices, and what it takes."""

    choices: tuple[Choice, ...]
    takes: Evaluation


@dataclass(frozen=True)
class Problem:
    """A chain, and how its plans are searched."""

    chain: Chain
    widths: tuple[int | None, ...] = _WIDTHS
    """Labels a state of the searches made one after the other, each for something faster. None: all, to be exact."""
    most_labels: int = _MOST_LABELS

    @cached_property
    def graph(self) -> Graph:
        """The choices as a graph."""
        return Graph.of(self.chain)

    @cached_property
    def needs(self) -> dict[Node, Needs]:
        """Bytes that the rest of a plan needs from each state on."""
        return needs_of(self.graph)

    @cached_property
    def least_bytes(self) -> int:
        """The least peak of all plans."""
        return max(self.chain.fixed_bytes, self.needs[self.graph.start].least_bytes)

    @cached_property
    def is_easy(self) -> bool:
        """Whether exact searches stay small: tried at some budgets, so that it depends on the chain alone."""
        unlimited = self.fastest(self.chain.most_bytes)
        assert unlimited is not None
        span = max(0, unlimited.takes.peak_bytes - self.least_bytes)
        probe = replace(self, most_labels=_MOST_TO_BE_EXACT)
        try:
            for part in range(1, _PROBES):
                probe.fastest(self.least_bytes + span * part // _PROBES)
        except TooManyLabels:
            return False
        return True

    def lower_bound(self, budget_bytes: int) -> int:
        """Nanoseconds that every plan takes which fits a budget: the least, where that can be told, or a relaxation."""
        try:
            fastest = replace(self, most_labels=_MOST_TO_BE_EXACT).fastest(budget_bytes)
        except TooManyLabels:
            bound = TimeBound.of(self.graph, budget_bytes).sharpened()
            return max(0, math.ceil(bound.nanoseconds - bound.error))
        assert fastest is not None
        return fastest.takes.nanoseconds

    def fastest(self, budget_bytes: int, limit: float = math.inf) -> Solution | None:
        """The fastest plan that fits a budget and takes no more than `limit` nanoseconds; None if there is none.

        Raises:
            TooManyLabels: when too many plans are nearly as fast.
        """
        bound = TimeBound.of(self.graph, budget_bytes)
        best: Solution | None = None
        for width in self.widths:
            bound = bound if width else bound.sharpened()
            outcome = search(
                self.graph, self.needs, bound, budget_bytes,
                limit_nanoseconds=limit, width=width, most_labels=self.most_labels,
            )  # fmt: skip
            if outcome.path is not None:
                best = self._solution(outcome.path)
                limit = best.takes.nanoseconds - 1
            if outcome.is_complete:
                break
        return best

    def leanest(self, start: Solution, limit: int) -> Solution:
        """The plan with the least peak of those that take no more than `limit` nanoseconds, as `start` does.

        The peak is sought downwards, in strides that double until there is no such plan, then by bisection.

        Raises:
            TooManyLabels: when too many plans are nearly as fast.
        """
        best, low, stride, is_found = start, self.least_bytes, 1, True
        while low < best.takes.peak_bytes:
            budget_bytes = max(low, best.takes.peak_bytes - stride)
            found = self.fastest(budget_bytes, limit)
            if found is None:
                low, is_found = budget_bytes + 1, False
            else:
                best = found
            stride = 2 * stride if is_found else max(1, (best.takes.peak_bytes - low) // 2)
        return best

    def _solution(self, path: Sequence[tuple[int, int]]) -> Solution:
        choices = tuple(self.chain.choices[block][index] for block, index in path)
        return Solution(choices, evaluate(self.chain, choices))
