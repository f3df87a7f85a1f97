"""A row of the matrix of architectures: its configuration in two sizes, its inputs, and how it becomes a workload."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import memscope
from memscope import StepPlan, Workload
from memscope.workload.batch import map_tensors

__all__ = ["ByHand", "Hf", "Mode", "Plain", "Row", "Size"]

Size = Literal["tiny", "usual"]
Values = Mapping[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Mode:
    """How a model is trained."""

    attention: str | None = None
    """As transformers calls it; None: its default for the model."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the weights."""
    autocast: Literal["off", "bf16"] = "off"


@dataclass(frozen=True)
class Hf:
    """A model of transformers that `hf:` can say: its configuration is all there is."""

    tiny: Values
    """Its config.json, tiny."""
    usual: Values = field(default_factory=dict)
    """Changes of the defaults of transformers for the usual size."""
    tiny_settings: Values = field(default_factory=dict)
    usual_settings: Values = field(default_factory=dict)
    task: str | None = None

    def build(self, size: Size, mode: Mode, folder: Path) -> Callable[[], Workload]:
        """The function that builds the workload; the folder gets a config.json."""
        kind = {"model_type": self.tiny["model_type"]}
        folder = folder / f"{kind['model_type']}-{self.task}-{size}"
        folder.mkdir(parents=True, exist_ok=True)
        values = self.tiny if size == "tiny" else {**kind, **self.usual}
        (folder / "config.json").write_text(json.dumps(values))
        settings = {"micro_batch": 2} | (
            {"seq_len": 16, "target_len": 8, **self.tiny_settings}
            if size == "tiny"
            else {"seq_len": 512, "target_len": 64, **self.usual_settings}
        )
        return memscope.hf(
            folder, task=self.task, attention=mode.attention, dtype=mode.dtype, autocast=mode.autocast, **settings
        )


def _own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ByHand:
    """A model of transformers whose inputs `hf:` does not know."""

    made: str
    """Its class."""
    tiny: Values
    """Its configuration, tiny."""
    batch: Callable[[Any], dict[str, Any]]
    """Two samples for a configuration."""
    usual: Values = field(default_factory=dict)
    loss: Callable[[Any, dict[str, Any]], Tensor] = _own_loss

    def build(self, size: Size, mode: Mode, folder: Path) -> Callable[[], Workload]:
        """The function that builds the workload."""
        return partial(self._build, self.tiny if size == "tiny" else self.usual, mode)

    def _build(self, values: Values, mode: Mode) -> Workload:
        import transformers

        made = getattr(transformers, self.made)
        config = made.config_class(**values)
        options = {} if mode.attention is None else {"attn_implementation": mode.attention}
        model = made._from_config(config, dtype=DTYPES[mode.dtype], **options)
        return _workload(model, self.batch(config), self.loss, mode)


@dataclass(frozen=True)
class Plain:
    """A model in plain PyTorch."""

    made: Callable[[Size, bool], tuple[nn.Module, dict[str, Any]]]
    """The model and a batch of a size; the flag: whether attention is written out."""
    loss: Callable[[Any, dict[str, Any]], Tensor] = lambda model, batch: model(**batch)

    def build(self, size: Size, mode: Mode, folder: Path) -> Callable[[], Workload]:
        """The function that builds the workload."""
        return partial(self._build, size, mode)

    def _build(self, size: Size, mode: Mode) -> Workload:
        model, batch = self.made(size, mode.attention == "eager")
        return _workload(model.to(DTYPES[mode.dtype]), batch, self.loss, mode)


def _workload(model: nn.Module, batch: dict[str, Any], loss: Any, mode: Mode) -> Workload:
    def as_weights(value: Tensor) -> Tensor:
        return value.to(DTYPES[mode.dtype]) if value.is_floating_point() else value

    return Workload(
        model=model,
        batches=[map_tensors(as_weights, batch)],
        loss=loss,
        optimizer_factory=torch.optim.AdamW,
        plan=StepPlan(autocast=None if mode.autocast == "off" else torch.bfloat16),
    )


@dataclass(frozen=True)
class Row:
    """An architecture."""

    name: str
    group: str
    how: Hf | ByHand | Plain
    attentions: tuple[str, ...] = ("eager", "sdpa")
    """The attention implementations it has; empty: it has no choice."""
    about: str = ""
    """What a reader of the table must know: a changed default, a loss of our own."""
    why: str = ""
    """Why a check fails, if one does."""
