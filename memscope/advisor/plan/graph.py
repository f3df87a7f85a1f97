"""The choices of a chain as a graph, in columns: a state is a layer and whether the choice before saves its output."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memscope.advisor.plan.chain import Chain
from memscope.trace import Ints

__all__ = ["Floats", "Graph", "Moves", "Node"]

Floats = npt.NDArray[np.float64]
Node = tuple[int, bool]
"""Layer, and whether the choice before it saves its output. Layers count on: the head, then the end."""


@dataclass(frozen=True, eq=False)
class Moves:
    """Choices that begin in one state and end in the same one; boundaries are in their bytes `[choices]`."""

    end: Node
    index: Ints
    """Place among the choices of the layer; 0 for the head."""
    kept: Ints
    """Bytes that each adds to those kept until the backward pass."""
    alive: Ints
    """Bytes that each adds to those alive until the forward pass ends: kept or held."""
    forward: Ints
    """Peak while its forward runs, beyond the bytes alive before."""
    backward: Ints
    """Peak while its backward runs, beyond the bytes kept before."""
    nanoseconds: Ints


@dataclass(frozen=True, eq=False)
class Graph:
    """Every way through a chain: from the first layer to the end, behind the head."""

    moves: dict[Node, tuple[Moves, ...]]
    """By state, in order of the layers; each state can be reached, and the end from it."""
    end: Node
    start: Node = (0, False)

    @classmethod
    def of(cls, chain: Chain) -> Graph:
        """The choices of a chain; the head is one more choice, without alternative."""
        layers = len(chain.choices)
        end = (layers + 1, False)
        moves: dict[Node, tuple[Moves, ...]] = {}
        reached = {cls.start}
        for node in ((layer, saved) for layer in range(layers + 1) for saved in (False, True)):
            if node in reached:
                moves[node] = _moves(chain, node) if node[0] < layers else (_head(chain, node, end),)
                reached.update(group.end for group in moves[node])
        leading = {end}
        for node in reversed(moves):
            moves[node] = tuple(group for group in moves[node] if group.end in leading)
            if moves[node]:
                leading.add(node)
        return cls({node: groups for node, groups in moves.items() if groups}, end)


def _moves(chain: Chain, node: Node) -> tuple[Moves, ...]:
    layer, is_saved = node
    boundary = chain.boundary_bytes[layer]
    columns: dict[Node, list[tuple[int, ...]]] = defaultdict(list)
    for index, choice in enumerate(chain.choices[layer]):
        kept = choice.kept_bytes + (boundary if choice.saves_input or is_saved else 0)
        backward = choice.backward_bytes + (boundary if is_saved and not choice.saves_input else 0)
        row = (index, kept, kept + choice.held_bytes, choice.forward_bytes, backward, choice.nanoseconds)
        columns[layer + choice.length, choice.saves_output].append(row)
    return tuple(Moves(end, *np.array(rows, dtype=np.int64).T) for end, rows in columns.items())


def _head(chain: Chain, node: Node, end: Node) -> Moves:
    layer, is_saved = node
    kept = chain.boundary_bytes[layer] if is_saved and not chain.head_saves_input else 0
    row = (0, kept, kept, kept + chain.head_forward_bytes, kept + chain.head_backward_bytes, 0)
    return Moves(end, *np.array([row], dtype=np.int64).T)
