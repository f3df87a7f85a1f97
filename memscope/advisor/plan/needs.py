"""How many bytes the rest of a plan needs at least, whatever is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from memscope.advisor.plan.moves import Floats, Graph, Ints, Node

__all__ = ["Needs", "needs_of", "staircase"]

_NOTHING = -(2**60)
"""What the end needs: less than anything, and far enough from the least integer."""
_Numbers = TypeVar("_Numbers", Ints, Floats)


@dataclass(frozen=True, eq=False)
class Needs:
    """Pairs of bytes that the rest of a plan can do with; none is better than another in both `[pairs]`."""

    forward: Ints
    """Needed by the forwards to come, beyond what is alive; rising."""
    backward: Ints
    """Needed by the backwards that belong to them, beyond what is kept; falling."""

    def are_met(self, kept: Ints, alive: Ints, budget_bytes: int) -> npt.NDArray[np.bool_]:
        """Whether partial plans, which keep and have alive so much, can be completed within a budget `[plans]`."""
        pair = np.searchsorted(self.forward, budget_bytes - alive, side="right") - 1
        return (pair >= 0) & (kept + self.backward[pair] <= budget_bytes)

    @property
    def least_bytes(self) -> int:
        """The least budget that will do when nothing is alive yet."""
        return int(np.maximum(self.forward, self.backward).min())


def needs_of(graph: Graph) -> dict[Node, Needs]:
    """What is needed from each state on: found backwards from the end, exactly."""
    nothing = np.array([_NOTHING], dtype=np.int64)
    found = {graph.end: Needs(nothing, nothing)}
    for node in reversed(graph.moves):
        forward, backward = [], []
        for moves in graph.moves[node]:
            rest = found[moves.end]
            forward.append(np.maximum(moves.forward[:, None], moves.alive[:, None] + rest.forward).ravel())
            backward.append(np.maximum(moves.backward[:, None], moves.kept[:, None] + rest.backward).ravel())
        found[node] = Needs(*staircase(np.concatenate(forward), np.concatenate(backward)))
    return found


def staircase(x: _Numbers, y: _Numbers) -> tuple[_Numbers, _Numbers]:
    """The points that no other beats in both coordinates: x rising, y falling."""
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    is_new = np.append(True, y[1:] < np.minimum.accumulate(y)[:-1])
    return x[is_new], y[is_new]
