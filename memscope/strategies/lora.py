"""Low-rank adaptation (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.errors import nearest
from memscope.strategies import Problem, Stage, Strategy
from memscope.workload.description import Workload

__all__ = ["LoRA", "LoRALinear", "adapt", "merge", "unmerge"]

_QUERY_AND_VALUE = (("wq", "wv"), ("q_proj", "v_proj"), ("query", "value"))
"""Names of the layers that Hu et al. adapt, in Meta's LLaMA, transformers' LLaMA, and BERT."""


class LoRA(Strategy):
    """Freeze the model and train low-rank updates of selected linear layers: `W + (alpha / r) · B · A`."""

    name = "lora"
    stage = Stage.ADAPT
    exact = False
    changes = "what is trained"
    provides = frozenset({"adapters"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "–",
        "gradient": "↓",
        "optimizer_state": "↓",
    }

    @dataclass(frozen=True)
    class Config:
        """The layers to adapt, and the size of their updates."""

        r: int = 16
        """Rank of the update."""
        alpha: float = 32.0
        """The update is scaled by alpha / r."""
        dropout: float = 0.05
        """Dropout on the input of the update."""
        targets: tuple[str, ...] = ("wq", "wv")
        """Linear layers to adapt: full module names or their last parts, joined by +."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """The query and value projections with the default rank and two others, at the default scale alpha / r.

        If the model has no layers of these names: every linear layer whose name occurs more than once.
        """
        fitting = Counter(name.rpartition(".")[2] for name in _adaptable(workload.model))
        repeated = tuple(name for name, count in fitting.items() if count > 1)
        targets = next((names for names in _QUERY_AND_VALUE if fitting.keys() >= {*names}), repeated)
        scale = cls.Config().alpha / cls.Config().r
        return [cls.Config(r=rank, alpha=scale * rank, targets=targets) for rank in (cls.Config().r, 8, 64) if targets]

    def check(self, workload: Workload) -> list[Problem]:
        """Report settings out of range and targets that cannot be adapted."""
        config, problems = self.config, []
        if config.r < 1:
            problems.append(Problem(f"r={config.r} is not a rank", "choose at least 1"))
        if not 0 <= config.dropout < 1:
            problems.append(
                Problem(f"dropout={config.dropout} is not a probability", "choose at least 0 and less than 1")
            )
        linear, tied = _linear(workload.model), _tied(workload.model)
        fits = {name.rpartition(".")[2] for name in _adaptable(workload.model)}
        for target in config.targets:
            matched = [name for name in linear if _matches(name, target)]
            if not matched:
                what = f'targets={target} matches no linear layer of "{workload.name}"'
                problems.append(Problem(what, nearest(target, fits)))
            for name in tied.keys() & matched:
                what = f'targets={target} matches "{name}", which shares its weight with "{tied[name]}"'
                problems.append(Problem(what, f"remove it. {nearest(target, fits)}"))
        return problems

    def apply(self, workload: Workload) -> None:
        """Freeze the model and replace each selected layer by a `LoRALinear`."""
        config, model = self.config, workload.model
        chosen = [name for name in _linear(model) if any(_matches(name, target) for target in config.targets)]
        assert chosen, "check() rejects targets that match no layer"
        adapt(model, chosen, r=config.r, alpha=config.alpha, dropout=config.dropout)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _adaptable(model: nn.Module) -> list[str]:
    """Linear layers that do not share their weight with another module."""
    tied = _tied(model)
    return [name for name in _linear(model) if name not in tied]


def _tied(model: nn.Module) -> dict[str, str]:
    """Modules that share a parameter with another module, each with the name of that module.

    A LoRA update of one would not reach the other; merging it would then change both.
    """
    places: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for key, module in parent._modules.items():
            for parameter in module.parameters(recurse=False) if module else ():
                places.setdefault(id(parameter), []).append(f"{prefix}.{key}" if prefix else key)
    return {name: next(o for o in names if o != name) for names in places.values() if len(names) > 1 for name in names}


class LoRALinear(nn.Linear):
    """A linear layer with its frozen weight and a trained low-rank update.

    `y = x · Wᵀ + b + (dropout(x) · Aᵀ · Bᵀ) · alpha / r` with x `[..., in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`.
    A is initialized with standard deviation 1/r (Gaussian), B with zeros, so the output is unchanged at first.
    """

    def __init__(self, layer: nn.Linear, *, r: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a = nn.Parameter(layer.weight.new_empty(r, self.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(self.out_features, r))
        nn.init.normal_(self.lora_a, std=1 / r)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / r
        self.merged = False
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        result = F.linear(x, self.weight, self.bias)
        if not self.merged:
            result += (self.dropout(x) @ self.lora_a.T @ self.lora_b.T) * self.scaling
        return result

    def extra_repr(self) -> str:
        """The text that `print(model)` shows for this layer."""
        return f"{super().extra_repr()}, r={self.lora_a.shape[0]}, scaling={self.scaling}"


def adapt(model: nn.Module, names: Iterable[str], *, r: int, alpha: float, dropout: float) -> None:
    """Freeze the model and replace each linear layer in `names` (full names) by a `LoRALinear`."""
    model.requires_grad_(False)
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(parent, name.rpartition(".")[2], LoRALinear(layer, r=r, alpha=alpha, dropout=dropout))


def _adapted(model: nn.Module) -> Iterator[LoRALinear]:
    yield from (module for module in model.modules() if isinstance(module, LoRALinear))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every update to its weight, so that inference has no extra cost. Merging twice has no further effect."""
    for layer in _adapted(model):
        if not layer.merged:
            layer.weight += layer.scaling * (layer.lora_b @ layer.lora_a)
            layer.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Subtract every merged update from its weight again, up to rounding."""
    for layer in _adapted(model):
        if layer.merged:
            layer.weight -= layer.scaling * (layer.lora_b @ layer.lora_a)
            layer.merged = False
