"""Activation checkpointing of chosen layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.workload import Workload

__all__ = ["Checkpoint", "chosen_layers", "find_layers"]


class Checkpoint(Strategy):
    """Drop the activations of chosen layers in the forward pass and compute them again in the backward pass."""

    name = "ckpt"
    stage = Stage.WRAP
    exact = True
    provides = frozenset({"recomputation"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "↓",
        "gradient": "–",
        "optimizer_state": "–",
        "computation": "↑",
    }

    @dataclass(frozen=True)
    class Config:
        """Which layers are recomputed."""

        layers: str = "all"
        """Which layers: all, every-2 (the first and each second one after it), 0-15, 3; or several, joined by +."""

    def check(self, workload: Workload) -> list[Problem]:
        """A model without layers, and a choice that it does not have."""
        try:
            chosen_layers(self.config.layers, len(find_layers(workload.model)))
        except UsageError as error:
            return [Problem(f"layers={self.config.layers}", str(error))]
        return []

    def apply(self, workload: Workload) -> None:
        """Wrap the forward of each chosen layer; modules, names and weights stay as they are."""
        layers = find_layers(workload.model)
        for layer in dict.fromkeys(layers[index] for index in chosen_layers(self.config.layers, len(layers))):
            layer.forward = _Checkpointed(layer.forward)


class _Checkpointed:
    """A forward function whose activations are computed again in the backward pass; random state is preserved."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers: its largest list (`nn.ModuleList` or `nn.Sequential`) of modules of one class.

    Raises:
        UsageError: when there is no list with two modules of one class.
    """
    lists = [
        list(m)
        for m in model.modules()
        if isinstance(m, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in m}) == 1
    ]
    layers = max(lists, key=_weight, default=[])
    if len(layers) < 2:
        raise UsageError(
            "the model has no list of repeated layers (nn.ModuleList or nn.Sequential of one class) to choose from"
        )
    return layers


def _weight(layers: list[nn.Module]) -> tuple[int, int]:
    return len(layers) > 1, sum(p.numel() for layer in layers for p in layer.parameters())


def chosen_layers(text: str, count: int) -> list[int]:
    """Indices that `all`, `every-2`, `0-15`, `3+7+11` choose out of `count` layers, in order.

    Raises:
        UsageError: when the text is malformed, or names a layer that is not there.
    """
    chosen: set[int] = set()
    for word in text.split("+"):
        every, span = re.fullmatch(r"every-([1-9]\d*)", word), re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if word == "all":
            chosen |= set(range(count))
        elif every:
            chosen |= set(range(0, count, int(every[1])))
        elif span:
            first, last = int(span[1]), int(span[2] or span[1])
            if last < first:
                raise UsageError(f'"{word}" runs backwards: write {last}-{first}')
            if last >= count:
                raise UsageError(f'"{word}" is outside the model: it has layers 0 to {count - 1}')
            chosen |= set(range(first, last + 1))
        else:
            raise UsageError(
                f'"{word}" chooses no layers: expected all, every-2, 0-15, or numbers joined by +, such as 3+7+11'
            )
    return sorted(chosen)
