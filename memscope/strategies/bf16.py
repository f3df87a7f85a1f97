"""Pure bfloat16 training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memscope.strategies import Problem, Stage, Strategy
from memscope.workload.batch import map_tensors
from memscope.workload.description import Workload

__all__ = ["BF16"]


class BF16(Strategy):
    """Hold the weights in bfloat16: activations, gradients and optimizer state follow, and no float32 copy is kept.

    Floating-point buffers follow too, as with `model.bfloat16()`; complex and integer ones stay.
    """

    name = "bf16"
    stage = Stage.LOAD
    exact = False
    changes = "the precision of weights, gradients and optimizer state"
    conflicts = frozenset({"gradient scaler"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "↓",
        "activation": "↓",
        "gradient": "↓",
        "optimizer_state": "↓",
    }

    @dataclass(frozen=True)
    class Config:
        """Nothing to set."""

    def check(self, workload: Workload) -> list[Problem]:
        """A model that is held in bfloat16 already."""
        model = workload.model
        if any(_is_lowered(tensor) for tensor in chain(model.parameters(), model.buffers())):
            return []
        return [Problem("the model has no floating-point weight in another precision than bfloat16", "leave it out")]

    def apply(self, workload: Workload) -> None:
        """Convert the model, and from now on what is put into it; targets of the loss keep their precision."""
        workload.model.bfloat16()
        workload.model.register_forward_pre_hook(_lower_inputs, with_kwargs=True)


def _is_lowered(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.bfloat16


def _lower_inputs(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return map_tensors(lambda t: t.bfloat16() if _is_lowered(t) else t, (args, kwargs))
