"""The options worth trying on a layer, derived from its structure and its trace rather than from names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TypeVar

from torch import nn

from memscope.strategies.ckpt.options import Call

__all__ = ["child_options", "saving_options", "spread"]

T = TypeVar("T")

_MOST_CALLS = 10
_MOST_SUBSETS = 5
_LEAST_SHARE = 0.01
"""Calls that take a smaller part of a layer's forward get no option."""


def child_options(layer: nn.Module) -> list[str]:
    """Options that checkpoint direct children of a layer: each child that has children, and all such children.

    A child without children, such as `nn.Linear`, keeps its input either way.
    """
    names = [name for name, child in layer.named_children() if any(True for _ in child.children())]
    every = ["+".join(names)] if len(names) > 1 else []
    return [f"recompute:{chosen}" for chosen in [*names, *every]]


def saving_options(seconds: Mapping[Call, float], size_bytes: Mapping[Call, int], less_than: int) -> list[str]:
    """Options that keep the results of some operators and recompute the rest.

    Time saved and bytes kept add up over calls, so all subsets of calls are tried, and some that no other subset beats
    are returned. Their real costs are measured afterwards.

    Args:
        seconds: time of each call in one forward pass of the layer.
        size_bytes: memory of its results.
        less_than: bytes that the layer keeps if nothing is recomputed; a subset that keeps as many gains nothing.
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
    return [f"save:{'+'.join(map('/'.join, chosen))}" for chosen in spread(front, _MOST_SUBSETS)]


def spread(entries: Sequence[T], count: int) -> list[T]:
    """At most `count` of the entries, evenly spread, first and last among them."""
    if len(entries) <= count:
        return list(entries)
    return [entries[round(index * (len(entries) - 1) / (count - 1))] for index in range(count)]
