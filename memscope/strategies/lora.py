"""Low-rank adaptation (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.errors import nearest
from memscope.strategies import Problem, Stage, Strategy
from memscope.workload import Workload

__all__ = ["LoRA", "LoRALinear", "merge", "unmerge"]


class LoRA(Strategy):
    """Freeze the model and train low-rank updates of chosen linear layers: `W + (alpha / r) · B · A`."""

    name = "lora"
    stage = Stage.ADAPT
    exact = False
    provides = frozenset({"adapters"})
    textbook = {"parameter": "↑", "activation": "–", "gradient": "↓", "optimizer_state": "↓", "computation": "↓"}

    @dataclass(frozen=True)
    class Config:
        r: int = 16
        """Rank of the update."""
        alpha: float = 32.0
        """The update is scaled by alpha / r."""
        dropout: float = 0.05
        """Dropout on the input of the update."""
        targets: tuple[str, ...] = ("wq", "wv")
        """Linear layers to adapt: last parts of module names, joined by +."""

    def check(self, workload: Workload) -> list[Problem]:
        config, problems = self.config, []
        if config.r < 1:
            problems.append(Problem(f"r={config.r} is no rank", "choose at least 1"))
        if not 0 <= config.dropout < 1:
            problems.append(
                Problem(f"dropout={config.dropout} is no probability", "choose 0 up to, but not including, 1")
            )
        linear = {name for name, module in workload.model.named_modules() if type(module) is nn.Linear}
        for target in config.targets:
            if not any(_matches(name, target) for name in linear):
                tails = Counter(name.rpartition(".")[2] for name in linear)
                problems.append(
                    Problem(f'targets={target} matches no linear layer of "{workload.name}"', nearest(target, tails))
                )
        return problems

    def apply(self, workload: Workload) -> None:
        config, model = self.config, workload.model
        model.requires_grad_(False)
        chosen = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and any(_matches(name, target) for target in config.targets)
        ]
        assert chosen, "check() lets only plans through that match a layer"
        for name in chosen:
            parent = model.get_submodule(name.rpartition(".")[0])
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            adapted = LoRALinear(layer, r=config.r, alpha=config.alpha, dropout=config.dropout)
            setattr(parent, name.rpartition(".")[2], adapted)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


class LoRALinear(nn.Linear):
    """A linear layer with its own weight, frozen, and a trained low-rank update.

    `y = x · Wᵀ + b + (dropout(x) · Aᵀ · Bᵀ) · alpha / r` with x `[..., in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`. A starts
    Gaussian with standard deviation 1/r and B at zero, so the output starts unchanged.
    """

    def __init__(self, layer: nn.Linear, *, r: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        options = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.lora_a = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, r, **options))
        nn.init.normal_(self.lora_a, std=1 / r)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / r
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        result = F.linear(x, self.weight, self.bias)
        if not self.merged:
            result += (self.dropout(x) @ self.lora_a.T @ self.lora_b.T) * self.scaling
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.lora_a.shape[0]}, scaling={self.scaling}"


def _adapted(model: nn.Module) -> Iterator[LoRALinear]:
    yield from (module for module in model.modules() if isinstance(module, LoRALinear))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every update to its weight, so that inference costs nothing more. Merging twice changes nothing."""
    for layer in _adapted(model):
        if not layer.merged:
            layer.weight += layer.scaling * (layer.lora_b @ layer.lora_a)
            layer.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Take every merged update out of its weight again, up to rounding."""
    for layer in _adapted(model):
        if layer.merged:
            layer.weight -= layer.scaling * (layer.lora_b @ layer.lora_a)
            layer.merged = False
