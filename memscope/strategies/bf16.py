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
    """Keep the weights in bfloat16, and with them activations, gradients and optimizer state; without a float32 copy.

    As with `model.bfloat16()`, floating-point buffers are converted too; complex and integer buffers are not.
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
        """No settings."""

    def check(self, workload: Workload) -> list[Problem]:
        """Report a model that is already in bfloat16."""
        model = workload.model
        if any(_is_lowered(tensor) for tensor in chain(model.parameters(), model.buffers())):
            return []
        return [Problem("all floating-point weights of the model are already in bfloat16", "remove this strategy")]

    def apply(self, workload: Workload) -> None:
        """Convert the model, and its inputs at every call. Targets of the loss keep their precision."""
        workload.model.bfloat16()
        workload.model.register_forward_pre_hook(_lower_inputs, with_kwargs=True)


def _is_lowered(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.bfloat16


def _lower_inputs(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return map_tensors(lambda t: t.bfloat16() if _is_lowered(t) else t, (args, kwargs))
