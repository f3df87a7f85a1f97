"""Low-rank adaptation (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from memscope.errors import nearest
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.lora.adapted import adapt
from memscope.strategies.lora.linear import adaptable_layers, linear_layers, matches, tied_layers
from memscope.strategies.lora.targets import all_linear, auto_targets
from memscope.workload.description import Workload

__all__ = ["LoRA"]

_AUTO, _ALL_LINEAR = "auto", "all-linear"


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
        targets: tuple[str, ...] = (_AUTO,)
        """Linear layers to adapt: full module names or their last parts, joined by +; auto: those that PEFT adapts in
        this type of model, or the query and value projections; all-linear: all but the output head."""

        def __post_init__(self) -> None:
            for word in (_AUTO, _ALL_LINEAR):
                if word in self.targets and len(self.targets) > 1:
                    raise ValueError(f"targets={word} stands alone: leave {word} or the other targets out")

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """The default targets with the default rank and two others, at the default scale alpha / r."""
        if not auto_targets(workload.model):
            return []
        scale = cls.Config().alpha / cls.Config().r
        return [cls.Config(r=rank, alpha=scale * rank) for rank in (cls.Config().r, 8, 64)]

    def check(self, workload: Workload) -> list[Problem]:
        """Report settings out of range and targets that cannot be adapted."""
        config, problems = self.config, []
        if config.r < 1:
            problems.append(Problem(f"r={config.r} is not a rank", "choose at least 1"))
        if not 0 <= config.dropout < 1:
            problems.append(
                Problem(f"dropout={config.dropout} is not a probability", "choose at least 0 and less than 1")
            )
        linear, tied = linear_layers(workload.model), tied_layers(workload.model)
        fits = {name.rpartition(".")[2] for name in adaptable_layers(workload.model)}
        if config.targets in ((_AUTO,), (_ALL_LINEAR,)):
            if not self._chosen(workload.model):
                what = f'targets={config.targets[0]} finds no linear layer to adapt in "{workload.name}"'
                problems.append(Problem(what, "remove this strategy"))
            return problems
        for target in config.targets:
            matched = [name for name in linear if matches(name, target)]
            if not matched:
                what = f'targets={target} matches no linear layer of "{workload.name}"'
                problems.append(Problem(what, nearest(target, fits)))
            for name in tied.keys() & matched:
                what = f'targets={target} matches "{name}", which shares its weight with "{tied[name]}"'
                problems.append(Problem(what, f"remove it. {nearest(target, fits)}"))
        return problems

    def apply(self, workload: Workload) -> None:
        """Freeze the model and make each selected layer a `LoRALinear`."""
        config, model = self.config, workload.model
        if config.targets == (_AUTO,):
            self.chosen = {"targets": "+".join(auto_targets(model))}
        layers = self._chosen(model)
        assert layers, "check() rejects targets that match no layer"
        adapt(model, layers, r=config.r, alpha=config.alpha, dropout=config.dropout)

    def _chosen(self, model: nn.Module) -> list[str]:
        """Full names of the selected layers."""
        if self.config.targets == (_ALL_LINEAR,):
            return all_linear(model)
        targets = auto_targets(model) if self.config.targets == (_AUTO,) else self.config.targets
        return [name for name in linear_layers(model) if any(matches(name, target) for target in targets)]
