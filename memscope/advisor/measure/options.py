"""The options worth trying on a layer: found in its structure and in a trace of it, not in a list of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from torch import nn

__all__ = ["Call", "child_options", "saving_options"]

Call = tuple[str, str]
"""Module inside the layer and operator without overload, such as `("feed_forward.w1", "aten.mm")`."""

_MOST_CALLS = 10
_MOST_SUBSETS = 5
_LEAST_SHARE = 0.01
"""Calls that take less than this part of a layer's forward are not worth a choice of their own."""


def child_options(layer: nn.Module) -> list[str]:
    """Checkpoint direct children of the layer, each on its own: every child that has children, and all of them.

    A child without any, such as a linear layer, keeps its input either way.
    """
    names = [name for name, child in layer.named_children() if any(True for _ in child.children())]
    every = ["+".join(names)] if len(names) > 1 else []
    return [f"recompute:{chosen}" for chosen in [*names, *every]]


def saving_options(seconds: Mapping[Call, float], size_bytes: Mapping[Call, int], less_than: int) -> list[str]:
    """Keep the results of some operators and recompute the rest: the subsets that nothing beats, thinned out.

    Time saved and bytes kept add up over calls, so the non-dominated subsets of the calls are found by trying all; what
    each one really takes is measured afterwards.

    Args:
        seconds: time of each call in one forward pass of the layer.
        size_bytes: memory of its results.
        less_than: what the layer keeps if nothing is recomputed: who keeps as much gains nothing.
    """
    total = sum(seconds.values())
    calls = [call for call in seconds if size_bytes.get(call) and seconds[call] >= _LEAST_SHARE * total]
    calls = sorted(calls, key=lambda call: (-seconds[call], call))[:_MOST_CALLS]
    subsets = [
        chosen
        for count in range(1, len(calls) + 1)
        for chosen in combinations(calls, count)
        if sum(size_bytes[call] for call in chosen) < less_than
    ]
    costed = sorted(
        ((sum(size_bytes[c] for c in chosen), -sum(seconds[c] for c in chosen), chosen) for chosen in subsets),
        key=lambda entry: entry[:2],
    )
    front: list[tuple[Call, ...]] = []
    best = 0.0
    for _, saved, chosen in costed:
        if saved < best - 1e-12:
            best = saved
            front.append(chosen)
    return [f"save:{'+'.join(map('/'.join, chosen))}" for chosen in _spread(front, _MOST_SUBSETS)]


def _spread(front: Sequence[tuple[Call, ...]], count: int) -> list[tuple[Call, ...]]:
    """At most `count` of them, first and last among them."""
    if len(front) <= count:
        return list(front)
    return [front[round(index * (len(front) - 1) / (count - 1))] for index in range(count)]
