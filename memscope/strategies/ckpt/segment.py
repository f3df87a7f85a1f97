"""One checkpoint over several consecutive layers, which keeps only the input of the first.

The model still calls its layers one by one. The first layer of a segment runs all of them; each of the others returns
its input. That is correct if every layer gets the result of the layer before and the same other arguments, which each
call checks.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies.ckpt.caches import without_caches
from memscope.strategies.ckpt.layers import list_of
from memscope.strategies.ckpt.options import Option
from memscope.strategies.ckpt.recompute import flatten, run_checkpointed

__all__ = ["checkpoint_together", "in_segments"]


def in_segments(model: nn.Module, layers: Iterable[str]) -> dict[str, Option]:
    """The option of each layer if √n checkpoints, rounded up, cover the n layers of each list.

    Rounded up, because a layer's activations, of which a segment has all at once, are larger than its input.
    """
    lists: dict[str, list[str]] = {}
    for name in layers:
        lists.setdefault(list_of(model, name), []).append(name)
    options: dict[str, Option] = {}
    for names in lists.values():
        segments = math.isqrt(len(names) - 1) + 1
        ends = [len(names) * (index + 1) // segments for index in range(segments)]
        for start, end in zip([0, *ends], ends, strict=False):
            options[names[start]] = Option("full", length=end - start)
            options |= {name: Option("within", head=names[start]) for name in names[start + 1 : end]}
    return options


def checkpoint_together(layers: Mapping[str, nn.Module]) -> None:
    """Wrap the forwards of consecutive layers, given by name, so that one checkpoint covers them."""
    segment = _Segment(tuple(layers), tuple(layers.values()))
    for index, layer in enumerate(layers.values()):
        layer.forward = _Member(segment, index, layer.forward)


@dataclass
class _Passing:
    """The arguments expected by the layers after the first, between their calls."""

    result: weakref.ref[Tensor]
    rest: tuple[Any, ...] | None
    """The rest of the tuple that a layer returns; None: it returns the tensor alone."""
    others: list[Any]
    """The other arguments."""
    index: int
    """Index of the layer to be called next."""


class _Segment:
    """The layers of one checkpoint."""

    def __init__(self, names: tuple[str, ...], layers: tuple[nn.Module, ...]) -> None:
        self.names, self.layers = names, layers
        self.is_running = False
        self.passing: _Passing | None = None

    def run(self, args: Any, kwargs: Any) -> Any:
        """Run the forwards of all layers inside one checkpoint; returns the result of the last one."""
        arguments = without_caches(args, kwargs, self.layers[0])
        leaves, _ = flatten(arguments)
        result = run_checkpointed(self._run, arguments)
        rest = result[1:] if isinstance(result, tuple) else None
        self.passing = _Passing(weakref.ref(_passed_on(result, self.names[-1])), rest, leaves[1:], 1)
        return result

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        leaves, rebuild = flatten((args, kwargs))
        outer, self.is_running = self.is_running, True
        try:
            for name, layer in zip(self.names, self.layers, strict=True):
                result = layer.forward(*args, **kwargs)
                args, kwargs = rebuild([_passed_on(result, name), *leaves[1:]])
            return result
        finally:  # a recomputation ends by an exception as soon as it has what the backward needs
            self.is_running = outer

    def pass_on(self, index: int, args: Any, kwargs: Any) -> Any:
        """The result of layer `index`, whose input is the result of the segment."""
        name, before, passing = self.names[index], self.names[index - 1], self.passing
        if passing is None or passing.index != index:
            raise UsageError(
                f"{name} is inside the checkpoint of {self.names[0]}, but is not called right after {before}: "
                "such layers cannot share one; use the option full for each"
            )
        leaves, _ = flatten(without_caches(args, kwargs, self.layers[index]))
        given, others = next(iter(leaves), None), leaves[1:]
        if given is not passing.result():
            raise UsageError(
                f"{name} is inside the checkpoint of {self.names[0]}, but is not given what {before} returned: "
                "the model does something in between; use the option full for each"
            )
        if len(others) != len(passing.others) or not all(map(_is_same, others, passing.others)):
            raise UsageError(
                f"{name} is inside the checkpoint of {self.names[0]}, but is given other arguments besides the result "
                f"of {before}: such layers cannot share one; use the option full for each"
            )
        passing.index += 1
        if passing.index == len(self.names):
            self.passing = None
        return given if passing.rest is None else (given, *passing.rest)


class _Member:
    """The forward function of a layer of a segment."""

    def __init__(self, segment: _Segment, index: int, forward: Callable[..., Any]) -> None:
        self.segment, self.index, self.forward = segment, index, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.segment.is_running:
            return self.forward(*args, **kwargs)
        if self.index == 0:
            return self.segment.run(args, kwargs)
        return self.segment.pass_on(self.index, args, kwargs)


def _passed_on(result: Any, name: str) -> Tensor:
    """The tensor that the next layer takes."""
    items = result if type(result) is tuple else (result,)
    if not items or not isinstance(items[0], Tensor) or any(item is not None for item in items[1:]):
        raise UsageError(
            f"{name} returns more than one tensor, or none: layers share a checkpoint only if each returns the tensor "
            "that the next one takes, and nothing else; use the option full for each"
        )
    return items[0]


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in _PLAIN and one == other)


_PLAIN = {bool, int, float, str, torch.dtype, torch.device}
