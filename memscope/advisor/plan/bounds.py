"""How much time the rest of a plan takes at least, whatever is chosen.

Two sums must stay under limits: what is kept, and what is alive. A bound follows one of them. The other is left out, or
gets a price at the one place where it matters most: a Lagrange multiplier.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memscope.advisor.plan.hulls import Hull, extremes, hulls
from memscope.advisor.plan.moves import Floats, Graph, Ints, Moves, Node

__all__ = ["TimeBound"]

_GOLDEN = (5**0.5 - 1) / 2
_PRICES_TRIED, _PRICES_USED = 12, 3
_LEAST_PRICE = 1e-3
"""Part of the highest price at which a price must help, or none is looked for."""
_RELATIVE_ERROR = 1e-12
"""Of a bound, at most: double precision, a few operations for each of some hundred layers."""


@dataclass(frozen=True, eq=False)
class _Relaxation:
    """A bound that follows one of the two sums, with a price on what is alive at one place."""

    hulls: dict[Node, Hull]
    """By state; states from which nothing fits are left out."""
    follows_alive: bool = False
    price: float = 0.0
    """Nanoseconds a byte."""
    place: int = -1
    """Layer whose forward has the price."""

    def at(self, node: Node, kept: Ints, alive: Ints) -> Floats:
        if node not in self.hulls:
            return np.full(len(kept), np.inf)
        rest = self.hulls[node].at(alive if self.follows_alive else kept)
        return rest + self.price * alive if node[0] <= self.place else rest

    def from_start(self, graph: Graph) -> float:
        nothing = np.zeros(1, dtype=np.int64)
        return float(self.at(graph.start, nothing, nothing)[0])


@dataclass(frozen=True, eq=False)
class TimeBound:
    """The best of several bounds, for one budget."""

    graph: Graph
    budget_bytes: int
    relaxations: tuple[_Relaxation, ...]

    @classmethod
    def of(cls, graph: Graph, budget_bytes: int) -> TimeBound:
        """Close where one of the sums decides alone."""
        found = [_following_kept(graph, budget_bytes)]
        if _is_anything_held(graph):
            found.append(_following_alive(graph, budget_bytes))
        return cls(graph, budget_bytes, tuple(found))

    def sharpened(self) -> TimeBound:
        """Close where both decide, too; this takes some time to make."""
        if not _is_anything_held(self.graph):
            return self
        priced = _best_prices(self)
        return TimeBound(self.graph, self.budget_bytes, (*self.relaxations, *priced))

    @cached_property
    def nanoseconds(self) -> float:
        """No plan takes less; infinite if none fits."""
        return max(bound.from_start(self.graph) for bound in self.relaxations)

    @cached_property
    def error(self) -> float:
        """Nanoseconds by which rounding may make a bound too high."""
        most = sum(max(int(moves.nanoseconds.max()) for moves in groups) for groups in self.graph.moves.values())
        return _RELATIVE_ERROR * (most + 4 * self.budget_bytes * max(bound.price for bound in self.relaxations))

    def at(self, node: Node, kept: Ints, alive: Ints) -> Floats:
        """Time that partial plans, which keep and have alive so much, take at least from a state on `[plans]`."""
        best = self.relaxations[0].at(node, kept, alive)
        for bound in self.relaxations[1:]:
            best = np.maximum(best, bound.at(node, kept, alive))
        return best


def _held(_: Node, moves: Moves) -> Ints:
    return moves.alive - moves.kept


def _is_anything_held(graph: Graph) -> bool:
    return any((moves.alive > moves.kept).any() for groups in graph.moves.values() for moves in groups)


def _following_kept(graph: Graph, budget_bytes: int, price: float = 0.0, place: int = -1) -> _Relaxation:
    """Forwards are taken to find as little held as is possible; one of them has a price on what is alive there."""
    least_held, _ = extremes(graph, _held)

    def limit(node: Node, moves: Moves) -> Ints:
        return budget_bytes - np.maximum(moves.backward, moves.forward + least_held[node])

    def cost(node: Node, moves: Moves) -> Ints | Floats:
        if node[0] > place:
            return moves.nanoseconds
        charged = moves.alive if moves.end[0] <= place else moves.forward - budget_bytes
        return moves.nanoseconds + price * charged

    found = hulls(graph, growth=lambda _, moves: moves.kept, limit=limit, cost=cost)
    return _Relaxation(found, follows_alive=False, price=price, place=place)


def _following_alive(graph: Graph, budget_bytes: int) -> _Relaxation:
    """Backwards are taken to find as little kept as is possible: as much of what is alive is held as can be."""
    _, most_held = extremes(graph, _held)

    def limit(node: Node, moves: Moves) -> Ints:
        return budget_bytes - np.maximum(moves.forward, moves.backward - most_held[node])

    found = hulls(graph, growth=lambda _, moves: moves.alive, limit=limit, cost=lambda _, moves: moves.nanoseconds)
    return _Relaxation(found, follows_alive=True)


def _best_prices(plain: TimeBound) -> list[_Relaxation]:
    """The relaxations with the best bounds, which are concave in the price: golden-section search."""
    graph, place = plain.graph, _fullest_forward(plain.graph)

    def relaxation(price: float) -> _Relaxation:
        return _following_kept(graph, plain.budget_bytes, price, place)

    def bound(found: _Relaxation) -> float:
        return found.from_start(graph)

    starts = [found.hulls[graph.start] for found in plain.relaxations if graph.start in found.hulls]
    most = 2 * max((hull.slope for hull in starts), default=0.0)
    if not most or bound(relaxation(_LEAST_PRICE * most)) <= bound(plain.relaxations[0]):
        return []
    low, high = 0.0, most
    left, right = relaxation(high - _GOLDEN * (high - low)), relaxation(low + _GOLDEN * (high - low))
    tried = [left, right]
    while len(tried) < _PRICES_TRIED:
        if bound(left) >= bound(right):
            high, right = right.price, left
            left = relaxation(high - _GOLDEN * (high - low))
            tried.append(left)
        else:
            low, left = left.price, right
            right = relaxation(low + _GOLDEN * (high - low))
            tried.append(right)
    return sorted(tried, key=bound, reverse=True)[:_PRICES_USED]


def _fullest_forward(graph: Graph) -> int:
    """The layer whose forward is likely to hold most; the head counts as one."""
    _, alive = extremes(graph, lambda _, moves: moves.alive)
    return max(graph.moves, key=lambda node: alive[node] + min(int(m.forward.min()) for m in graph.moves[node]))[0]
