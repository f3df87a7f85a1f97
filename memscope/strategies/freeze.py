"""Freeze a part of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.ckpt.layers import chosen_layers, repeated_layers
from memscope.strategies.embeddings import embeddings
from memscope.workload.description import Workload

__all__ = ["Freeze"]

_NONE = "none"


class Freeze(Strategy):
    """Do not train the embeddings, or the first layers with them.

    Activations below the lowest trained weight are not kept; frozen layers above it need theirs for the gradient of
    their input.
    """

    name = "freeze"
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
        """The frozen part."""

        layers: str = _NONE
        """Layers to freeze: 0-15, numbers joined by +, or every-2; none: no layer."""
        embeddings: bool = True
        """Freeze the embeddings too: as long as they are trained, the layers above them keep their activations."""

        def __post_init__(self) -> None:
            if self.layers == _NONE and not self.embeddings:
                raise ValueError("nothing is frozen: choose layers, such as layers=0-15, or embeddings")

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """The embeddings with the first half, quarter and three quarters of the layers."""
        count = len(repeated_layers(workload.model))
        shares = dict.fromkeys(round(count * share) for share in (0.5, 0.25, 0.75))
        return [cls.Config(f"0-{last - 1}" if last > 1 else "0") for last in shares if 0 < last < count]

    def check(self, workload: Workload) -> list[Problem]:
        """Report layers or embeddings that the model does not have, and a plan that freezes everything."""
        model = workload.model
        if self.config.embeddings and not embeddings(model):
            what = f'"{workload.name}" has no embeddings'
            return [Problem(what, "choose embeddings=false and layers, or remove this strategy")]
        if self.config.layers != _NONE and not repeated_layers(model):
            return [Problem(f'"{workload.name}" has no list of repeated layers', "choose layers=none")]
        try:
            frozen = {id(p) for module in self._frozen(model).values() for p in module.parameters()}
        except UsageError as error:
            what, _, fix = str(error).partition(": ")
            return [Problem(f"layers={self.config.layers}: {what}", fix)]
        trained = [p for p in model.parameters() if p.requires_grad]
        if trained and all(id(parameter) in frozen for parameter in trained):
            return [Problem("every trained parameter would be frozen", "freeze fewer layers")]
        if not any(id(parameter) in frozen for parameter in trained):
            return [Problem("the chosen part is not trained anyway", "remove this strategy")]
        return []

    def apply(self, workload: Workload) -> None:
        """Freeze the chosen part; note another module that shares a frozen weight."""
        frozen = self._frozen(workload.model)
        for module in frozen.values():
            module.requires_grad_(False)
        held = {id(p) for module in frozen.values() for p in module.parameters()}
        for name, module in workload.model.named_modules():
            inside = any(name == one or name.startswith(f"{one}.") for one in frozen)
            if not inside and any(id(p) in held for p in module.parameters(recurse=False)):
                note = f"freeze: {name} shares its weight with the frozen embeddings, and is not trained either"
                workload.notes = (*workload.notes, note)

    def _frozen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to freeze, by name.

        Raises:
            UsageError: the layers cannot be chosen.
        """
        found = embeddings(model) if self.config.embeddings else {}
        if self.config.layers == _NONE:
            return found
        layers = [*repeated_layers(model).items()]
        return found | {layers[i][0]: layers[i][1] for i in chosen_layers(self.config.layers, len(layers))}
