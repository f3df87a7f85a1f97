"""The least that the rest of a plan takes, whatever is chosen: bytes, exactly, and time, from below.

Both are found backwards from the end of the chain, state by state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from memscope.advisor.plan.graph import Floats, Graph, Moves, Node
from memscope.trace import Ints

__all__ = ["Needs", "TimeBound", "needs_of"]

_NOTHING = -(2**60)
"""Bytes that the end needs: fewer than any state, and far enough from the least integer."""
_RELATIVE_ERROR = 1e-12
"""Of a time bound, at most: double precision, a few operations for each of some hundred layers."""
_Numbers = TypeVar("_Numbers", Ints, Floats)


@dataclass(frozen=True, eq=False)
class Needs:
    """The pairs of bytes that suffice for the rest of a plan; no pair is better than another in both `[pairs]`."""

    forward: Ints
    """For the forwards to come, beyond the bytes that are alive; rising."""
    backward: Ints
    """For their backwards, beyond the bytes that are kept; falling."""

    def are_met(self, kept: Ints, alive: Ints, budget_bytes: int) -> npt.NDArray[np.bool_]:
        """Whether partial plans with these bytes kept and alive can be completed within a budget `[plans]`."""
        pair = np.searchsorted(self.forward, budget_bytes - alive, side="right") - 1
        return (pair >= 0) & (kept + self.backward[pair] <= budget_bytes)

    @property
    def least_bytes(self) -> int:
        """The smallest feasible budget when nothing is alive yet."""
        return int(np.maximum(self.forward, self.backward).min())


def needs_of(graph: Graph) -> dict[Node, Needs]:
    """The bytes needed from each state on, exactly."""
    nothing = np.array([_NOTHING], dtype=np.int64)
    found = {graph.end: Needs(nothing, nothing)}
    for node in reversed(graph.moves):
        forward, backward = [], []
        for moves in graph.moves[node]:
            rest = found[moves.end]
            forward.append(np.maximum(moves.forward[:, None], moves.alive[:, None] + rest.forward).ravel())
            backward.append(np.maximum(moves.backward[:, None], moves.kept[:, None] + rest.backward).ravel())
        found[node] = Needs(*_staircase(np.concatenate(forward), np.concatenate(backward)))
    return found


@dataclass(frozen=True, eq=False)
class _Curve:
    """A convex function that never falls: level up to its first corner, infinite beyond its last `[corners]`."""

    size_bytes: Floats
    nanoseconds: Floats

    def at(self, size_bytes: Ints | Floats) -> Floats:
        """Its values `[sizes]`."""
        return np.interp(size_bytes, self.size_bytes, self.nanoseconds, right=np.inf)


@dataclass(frozen=True, eq=False)
class TimeBound:
    """The least time from each state to the end within a budget, as a function of the bytes alive before the state.

    The curve of a state is the least over its choices, made convex from below before the states in front of it are
    looked at: at least as good as a Lagrangian relaxation with any multipliers. Bytes kept are not followed: as many
    of the bytes alive as the choices in front of a state allow are taken to be held, so backwards find the least kept.
    """

    graph: Graph
    curves: dict[Node, _Curve]
    """By state; states from which nothing fits are left out."""

    @classmethod
    def of(cls, graph: Graph, budget_bytes: int) -> TimeBound:
        """The bound for one budget."""
        least, most = _range(graph, lambda moves: moves.alive)
        _, most_held = _range(graph, lambda moves: moves.alive - moves.kept)
        curves = {graph.end: _Curve(np.array([np.inf]), np.array([0.0]))}
        for node in reversed(graph.moves):
            parts = []
            for moves in graph.moves[node]:
                limit = budget_bytes - np.maximum(moves.forward, moves.backward - most_held[node])
                if moves.end in curves:
                    parts.append(_continued(curves[moves.end], moves, limit))
            if parts:
                sizes, times = (np.concatenate(columns) for columns in zip(*parts, strict=True))
                if sizes.max() >= least[node]:
                    curves[node] = _convex(sizes, times, least[node], most[node])
        return cls(graph, curves)

    def at(self, node: Node, alive: Ints) -> Floats:
        """Nanoseconds that partial plans with these bytes alive take from a state on, at least `[plans]`."""
        return self.curves[node].at(alive) if node in self.curves else np.full(len(alive), np.inf)

    @property
    def nanoseconds(self) -> float:
        """No plan takes less; infinite if none fits."""
        return float(self.at(self.graph.start, np.zeros(1, dtype=np.int64))[0])

    @cached_property
    def error(self) -> float:
        """Nanoseconds by which rounding may make the bound too high."""
        return _RELATIVE_ERROR * sum(
            max(int(moves.nanoseconds.max()) for moves in groups) for groups in self.graph.moves.values()
        )


def _continued(rest: _Curve, moves: Moves, limit: Ints) -> tuple[Floats, Floats]:
    """Corners of the curves that choices make of the one behind them: shifted, and cut off at `limit` bytes alive."""
    sizes = rest.size_bytes - moves.alive[:, None]
    times = rest.nanoseconds + moves.nanoseconds[:, None]
    inside = sizes <= limit[:, None]
    is_cut = sizes[:, -1] > limit
    at_cut = rest.at(limit[is_cut] + moves.alive[is_cut]) + moves.nanoseconds[is_cut]
    return np.concatenate([sizes[inside], limit[is_cut]]), np.concatenate([times[inside], at_cut])


def _convex(sizes: Floats, times: Floats, least: int, most: int) -> _Curve:
    """The largest convex function below all points that never falls, from `least` to `most` bytes."""
    falling, times = _staircase(-sizes, times)
    sizes, times = -falling[::-1], times[::-1]
    while len(sizes) > 2:
        width, height = np.diff(sizes), np.diff(times)
        # A point on or above the line between its neighbours is no corner, whatever is dropped beside it.
        is_corner = np.concatenate([[True], height[:-1] * width[1:] < height[1:] * width[:-1], [True]])
        if is_corner.all():
            break
        sizes, times = sizes[is_corner], times[is_corner]
    first = max(int(np.searchsorted(sizes, least, side="right")) - 1, 0)
    last = int(np.searchsorted(sizes, most, side="right"))
    return _Curve(sizes[first : last + 1], times[first : last + 1])


def _staircase(x: _Numbers, y: _Numbers) -> tuple[_Numbers, _Numbers]:
    """The points that no other beats in both coordinates: x rising, y falling."""
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    is_new = np.append(True, y[1:] < np.minimum.accumulate(y)[:-1])
    return x[is_new], y[is_new]


def _range(graph: Graph, amount: Callable[[Moves], Ints]) -> tuple[dict[Node, int], dict[Node, int]]:
    """Least and most of a sum over the choices in front of each state."""
    least, most = {graph.start: 0}, {graph.start: 0}
    for node, groups in graph.moves.items():
        for moves in groups:
            added = amount(moves)
            low, high = least[node] + int(added.min()), most[node] + int(added.max())
            least[moves.end] = min(least.get(moves.end, low), low)
            most[moves.end] = max(most.get(moves.end, high), high)
    return least, most
