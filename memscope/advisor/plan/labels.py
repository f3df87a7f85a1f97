"""Search for the fastest plan among partial plans, called labels.

A label-setting algorithm (Irnich and Desaulniers, "Shortest path problems with resource constraints", in Column
Generation, Springer 2005), with bounds on the bytes and the time that complete a label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memscope.advisor.plan.bounds import Needs, TimeBound
from memscope.advisor.plan.graph import Graph, Moves, Node
from memscope.trace import Ints

__all__ = ["Labels", "TooManyLabels", "best_path", "undominated"]

_AT_ONCE = 2**20
"""Labels tried at once; this limits memory and does not change the result."""
_MOST_CANDIDATES = 8
"""Candidates for each label that may be kept; this limits memory too."""


class TooManyLabels(Exception):
    """There are too many labels: many plans are nearly as good as the best."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Partial plans that lead to the same state `[labels]`."""

    kept: Ints
    alive: Ints
    nanoseconds: Ints
    before: Ints
    """Number of the label that each continues; labels are numbered in the order they are settled."""
    index: Ints
    """Place of the last choice among those of its layer."""

    def at(self, chosen: Ints | npt.NDArray[np.bool_] | slice) -> Labels:
        """The chosen labels."""
        return Labels(*(column[chosen] for column in vars(self).values()))

    def __len__(self) -> int:
        return len(self.kept)


@dataclass(frozen=True, eq=False)
class _Settled:
    """The way back from the labels of a state that were continued."""

    layer: int
    first: int
    """Number of the first of them."""
    before: Ints
    index: Ints


Path = tuple[tuple[int, int], ...]
"""Layer, and place among its choices, of every choice."""


def best_path(
    graph: Graph,
    needs: Mapping[Node, Needs],
    bound: TimeBound,
    budget_bytes: int,
    *,
    limit_nanoseconds: float,
    width: int | None,
    most_labels: int,
) -> tuple[Path | None, bool]:
    """The fastest plan found that fits a budget and takes no longer than a limit, and whether the search is complete.

    After a complete search, no plan is faster; without a path, no plan fits both budget and limit.

    Args:
        graph: the choices.
        needs: bytes needed from each state on.
        bound: time needed from each state on, for this budget.
        budget_bytes: limit on the left side of every constraint.
        limit_nanoseconds: limit on the time of a plan.
        width: most labels of a state to continue, chosen by their time bounds; None: all.
        most_labels: most labels of a state when all are continued.

    Raises:
        TooManyLabels: when a state has more.
    """
    waiting: dict[Node, list[Labels]] = defaultdict(list)
    waiting[graph.start].append(Labels(*np.zeros((5, 1), dtype=np.int64)))
    settled: list[_Settled] = []
    count, is_complete = 0, True
    for node, groups in graph.moves.items():
        labels = undominated(waiting.pop(node, []), most_labels)
        if width is not None and len(labels) > width:
            promise = labels.nanoseconds + bound.at(node, labels.alive)
            labels, is_complete = labels.at(np.sort(np.argsort(promise, kind="stable")[:width])), False
        elif len(labels) > most_labels:
            raise TooManyLabels
        for moves in groups:
            for longer in _continued(labels, count, moves, budget_bytes):
                found = longer.at(needs[moves.end].are_met(longer.kept, longer.alive, budget_bytes))
                promise = found.nanoseconds + bound.at(moves.end, found.alive)
                waiting[moves.end].append(found.at(promise <= limit_nanoseconds + bound.error))
        settled.append(_Settled(node[0], count, labels.before, labels.index))
        count += len(labels)
    last = undominated(waiting[graph.end], most_labels)
    if not len(last):
        return None, is_complete
    return _path(settled, int(last.before[np.argmin(last.nanoseconds)])), is_complete


def _continued(labels: Labels, first: int, moves: Moves, budget_bytes: int) -> Iterator[Labels]:
    """Every label with every choice that fits, in parts."""
    step = max(1, _AT_ONCE // len(moves.index))
    for start in range(0, len(labels), step):
        part = labels.at(slice(start, start + step))
        fits = part.kept[:, None] + moves.backward <= budget_bytes
        fits &= part.alive[:, None] + moves.forward <= budget_bytes
        label, choice = np.nonzero(fits)
        yield Labels(
            part.kept[label] + moves.kept[choice],
            part.alive[label] + moves.alive[choice],
            part.nanoseconds[label] + moves.nanoseconds[choice],
            first + start + label,
            moves.index[choice],
        )


def _path(settled: list[_Settled], number: int) -> Path:
    """The choices that lead from the start to a label in front of the head."""
    path: list[tuple[int, int]] = []
    index = -1
    for state in reversed(settled):
        row = number - state.first
        if 0 <= row < len(state.before):
            path.append((state.layer, index))
            number, index = int(state.before[row]), int(state.index[row])
            if state.layer == 0:
                break
    return tuple(reversed(path[1:]))


def undominated(parts: list[Labels], most_labels: int) -> Labels:
    """The labels that no other label beats in bytes kept, bytes alive and time; one of equal labels.

    Raises:
        TooManyLabels: when there are many times `most_labels` to begin with.
    """
    if not parts:
        return Labels(*np.zeros((5, 0), dtype=np.int64))
    labels = Labels(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))
    if len(labels) > _MOST_CANDIDATES * most_labels:
        raise TooManyLabels
    for first, second in (("kept", "alive"), ("alive", "kept"), ("kept", "alive")):
        order = np.lexsort((labels.nanoseconds, getattr(labels, second), getattr(labels, first)))
        labels = labels.at(order)
        fastest = np.minimum.accumulate(labels.nanoseconds)
        is_faster = np.ones(len(labels), dtype=np.bool_)
        is_faster[1:] = labels.nanoseconds[1:] < fastest[:-1]
        if is_faster.all():
            return labels
        holder = np.maximum.accumulate(np.where(is_faster, np.arange(len(labels)), 0))
        size = getattr(labels, second)
        labels = labels.at(is_faster | (size[holder] > size))
    return labels.at(~_dominated(labels))


def _dominated(labels: Labels) -> npt.NDArray[np.bool_]:
    """Which labels an earlier label equals or beats, when they are sorted by bytes kept, then by bytes alive.

    A label in the upper half of a range can be beaten from the lower half in the two other columns. So ranges of two,
    four, eight and so on are compared, all ranges of one size at once.
    """
    count = len(labels)
    by_alive = np.argsort(labels.alive, kind="stable")
    time = np.unique(labels.nanoseconds, return_inverse=True)[1]
    dominated = np.zeros(count, dtype=np.bool_)
    half = 1
    while half < count:
        order = by_alive[np.argsort(by_alive // (2 * half), kind="stable")]
        is_upper = order // half % 2 == 1
        # Times of later ranges lie below those of earlier ones, so that the running minimum starts anew in each.
        shift = order // (2 * half) * (count + 2)
        fastest = np.minimum.accumulate(np.where(is_upper, count + 1, time[order]) - shift) + shift
        dominated[order[is_upper & (fastest <= time[order])]] = True
        half *= 2
    return dominated
