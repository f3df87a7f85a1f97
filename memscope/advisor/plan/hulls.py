"""Convex functions of bytes, and the least time of a chain filled up to one at every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memscope.advisor.plan.moves import Floats, Graph, Ints, Moves, Node
from memscope.advisor.plan.needs import staircase

__all__ = ["Hull", "OfMoves", "extremes", "hulls"]

OfMoves = Callable[[Node, Moves], Ints | Floats]
"""A number for each choice of a state `[choices]`."""


@dataclass(frozen=True, eq=False)
class Hull:
    """A convex function that never falls: level up to its first corner, infinite beyond its last `[corners]`."""

    size_bytes: Floats
    nanoseconds: Floats

    def at(self, size_bytes: Ints | Floats) -> Floats:
        """Its values `[sizes]`."""
        return np.interp(size_bytes, self.size_bytes, self.nanoseconds, right=np.inf)

    @property
    def slope(self) -> float:
        """Nanoseconds a byte, from 0 bytes upwards."""
        right = int(np.searchsorted(self.size_bytes, 0, side="right"))
        if not 0 < right < len(self.size_bytes):
            return 0.0
        rise = self.nanoseconds[right] - self.nanoseconds[right - 1]
        return float(rise / (self.size_bytes[right] - self.size_bytes[right - 1]))


def hulls(graph: Graph, *, growth: OfMoves, limit: OfMoves, cost: OfMoves) -> dict[Node, Hull]:
    """Bounds on the cost of the way to the end, as functions of a sum so far, one for each state.

    Going backwards, the function of a state is the least over its choices, made convex from below before the states in
    front of it are looked at: at least as good as a Lagrangian relaxation of the sum, with any multipliers. States from
    which nothing fits are left out.

    Args:
        graph: the choices.
        growth: what each adds to the sum.
        limit: largest sum before each.
        cost: what each adds to the cost.
    """
    least, most = extremes(graph, growth)
    found = {graph.end: Hull(np.array([np.inf]), np.array([0.0]))}
    for node in reversed(graph.moves):
        parts = [
            _continued(found[moves.end], growth(node, moves), limit(node, moves), cost(node, moves))
            for moves in graph.moves[node]
            if moves.end in found
        ]
        if parts:
            sizes, costs = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            if sizes.max() >= least[node]:
                found[node] = _convex(sizes, costs, least[node], most[node])
    return found


def _continued(rest: Hull, growth: Ints | Floats, limit: Ints | Floats, cost: Ints | Floats) -> tuple[Floats, Floats]:
    """Corners of the functions that choices make of the one behind them: shifted, and cut off at their limits."""
    sizes = rest.size_bytes - growth[:, None]
    costs = rest.nanoseconds + cost[:, None]
    inside = sizes <= limit[:, None]
    is_cut = sizes[:, -1] > limit
    at_cut = rest.at(limit[is_cut] + growth[is_cut]) + cost[is_cut]
    return np.concatenate([sizes[inside], limit[is_cut]]), np.concatenate([costs[inside], at_cut])


def _convex(sizes: Floats, costs: Floats, least: int, most: int) -> Hull:
    """The largest convex function below all points that never falls; only what matters from `least` to `most` bytes."""
    falling, costs = staircase(-sizes, costs)
    sizes, costs = -falling[::-1], costs[::-1]
    while len(sizes) > 2:
        width, height = np.diff(sizes), np.diff(costs)
        # A point on or above the line between its neighbours is no corner, whatever is dropped beside it.
        is_corner = np.concatenate([[True], height[:-1] * width[1:] < height[1:] * width[:-1], [True]])
        if is_corner.all():
            break
        sizes, costs = sizes[is_corner], costs[is_corner]
    first = max(int(np.searchsorted(sizes, least, side="right")) - 1, 0)
    last = int(np.searchsorted(sizes, most, side="right"))
    return Hull(sizes[first : last + 1], costs[first : last + 1])


def extremes(graph: Graph, amount: OfMoves) -> tuple[dict[Node, int], dict[Node, int]]:
    """Least and most of a sum over the choices in front of each state."""
    least, most = {graph.start: 0}, {graph.start: 0}
    for node, groups in graph.moves.items():
        for moves in groups:
            added = amount(node, moves)
            low, high = least[node] + int(added.min()), most[node] + int(added.max())
            least[moves.end] = min(least.get(moves.end, low), low)
            most[moves.end] = max(most.get(moves.end, high), high)
    return least, most
