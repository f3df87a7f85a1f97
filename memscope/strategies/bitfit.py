"""BitFit: train the biases alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from memscope.errors import nearest
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.biases import biases
from memscope.strategies.lora.linear import matches
from memscope.strategies.lora.targets import output_head
from memscope.workload.description import Workload

__all__ = ["BitFit"]

_ALL = "all"


class BitFit(Strategy):
    """Freeze the model except for its biases (Ben Zaken et al., "BitFit", 2022)."""

    name = "bitfit"
    stage = Stage.ADAPT
    exact = False
    trains = "which weights are trained"
    changes = "what is trained"
    conflicts = frozenset({"adapters"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "↓",
        "gradient": "↓",
        "optimizer_state": "↓",
    }

    @dataclass(frozen=True)
    class Config:
        """Which biases are trained."""

        bias: tuple[str, ...] = (_ALL,)
        """Modules whose biases are trained: full names or their last parts, joined by +; all: every module."""
        head: bool = False
        """Train the output head or classifier too, as for a new task."""

        def __post_init__(self) -> None:
            if _ALL in self.bias and len(self.bias) > 1:
                raise ValueError("bias=all stands alone: leave all or the modules out")

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """All biases; none for a model without biases."""
        return [cls.Config()] if biases(workload.model) else []

    def check(self, workload: Workload) -> list[Problem]:
        """Report a model without biases, modules without one, and a head that is not found."""
        model, found = workload.model, biases(workload.model)
        if not found:
            return [Problem(f'"{workload.name}" has no bias to train', "use lora or peft:ln_tuning")]
        problems = []
        if self.config.bias != (_ALL,):
            owners = {name.rpartition(".")[0] for name in found}
            last = {owner.rpartition(".")[2] for owner in owners}
            for target in self.config.bias:
                if not any(matches(owner, target) for owner in owners):
                    what = f'bias={target} matches no module of "{workload.name}" with a bias'
                    problems.append(Problem(what, nearest(target, last)))
        if self.config.head and output_head(model) is None:
            problems.append(Problem(f'"{workload.name}" has no output head that can be told', "leave head out"))
        return problems

    def apply(self, workload: Workload) -> None:
        """Freeze everything but the chosen biases, and the head if it is asked for."""
        model = workload.model
        model.requires_grad_(False)
        for name, bias in biases(model).items():
            owner = name.rpartition(".")[0]
            if self.config.bias == (_ALL,) or any(matches(owner, target) for target in self.config.bias):
                bias.requires_grad_(True)
        if self.config.head:
            head = output_head(model)
            assert isinstance(head, nn.Module), "check() rejects a model without a head"
            head.requires_grad_(True)
