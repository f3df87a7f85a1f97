"""Low-rank adaptation (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021) and its variants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.biases import biases
from memscope.strategies.lora.adapted import adapt
from memscope.strategies.lora.start import Start, setup_bytes
from memscope.strategies.lora.targets import AUTO, auto_targets, chosen_linear, require_one_word, target_problems
from memscope.units import format_bytes
from memscope.workload.description import Workload
from memscope.workload.quantized import is_quantized

__all__ = ["LoRA"]

_SETUP = (
    "lora: {start} decomposes each adapted weight before the first step, which the figures leave out: where the model "
    "is on the GPU by then, up to {size} beside the model, and the workspace of cuSOLVER"
)


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
        targets: tuple[str, ...] = (AUTO,)
        """Linear layers to adapt: full module names or their last parts, joined by +; auto: those that PEFT adapts in
        this type of model, or the query and value projections; all-linear: all but the output head."""
        dora: bool = False
        """DoRA: also train the norm of each row of the adapted weights, with the temporaries of PEFT's layer."""
        rslora: bool = False
        """rsLoRA: scale by alpha / √r instead, which changes no size."""
        pissa: bool = False
        """PiSSA: start from the largest singular values of each weight, found before the first step."""
        olora: bool = False
        """OLoRA: start from the QR decomposition of each weight, found before the first step."""
        bias: Literal["none", "all", "lora_only"] = "none"
        """Biases to train: none, all of the model, or those of the adapted layers."""

        def __post_init__(self) -> None:
            require_one_word(self.targets)
            if self.pissa and self.olora:
                raise ValueError("pissa and olora are two initializations: leave one out")

        @property
        def start(self) -> Start:
            """How the update starts."""
            return "pissa" if self.pissa else "olora" if self.olora else "gaussian"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        if self.config.dora or self.config.start != "gaussian":
            self.provides = self.provides | {"reading of weights"}

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
        problems += target_problems(workload.model, config.targets, workload.name)
        return problems or [*self._problems_of_layers(workload)]

    def _problems_of_layers(self, workload: Workload) -> Iterator[Problem]:
        config, model = self.config, workload.model
        layers: list[Any] = [model.get_submodule(name) for name in chosen_linear(model, config.targets)]
        if "reading of weights" in self.provides and any(map(is_quantized, layers)):
            yield Problem("adapted weights are quantized, and DoRA, PiSSA and OLoRA read them", "use plain LoRA")
            return
        least = min(min(layer.weight.shape) for layer in layers)
        if config.start != "gaussian" and config.r > least:
            what = f"r={config.r} is more than the {least} rows or columns of the smallest adapted weight"
            yield Problem(what, f"choose at most {least}, or leave {config.start} out")
        if config.bias != "none" and not biases(model if config.bias == "all" else nn.ModuleList(layers)):
            where = f'"{workload.name}" has' if config.bias == "all" else "the adapted layers have"
            yield Problem(f"bias={config.bias}, but {where} no bias", "choose bias=none")

    def apply(self, workload: Workload) -> None:
        """Freeze the model, make each selected layer a `LoRALinear`, and train the biases that are asked for."""
        config, model = self.config, workload.model
        if config.targets == (AUTO,):
            self.chosen = {"targets": "+".join(auto_targets(model))}
        names = chosen_linear(model, config.targets)
        assert names, "check() rejects targets that match no layer"
        if config.start != "gaussian":
            weights = [model.get_parameter(f"{name}.weight") for name in names]
            most = max(map(setup_bytes, weights))
            workload.notes = (*workload.notes, _SETUP.format(start=config.start, size=format_bytes(most)))
        adapt(
            model,
            names,
            r=config.r,
            alpha=config.alpha,
            dropout=config.dropout,
            rslora=config.rslora,
            dora=config.dora,
            start=config.start,
        )
        trained = {"none": [], "all": [model], "lora_only": [model.get_submodule(name) for name in names]}
        for module in trained[config.bias]:
            for bias in biases(module).values():
                bias.requires_grad_(True)
