"""Automatic mixed precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from memscope.strategies import Problem, Stage, Strategy
from memscope.workload.description import Workload

__all__ = ["AMP"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class AMP(Strategy):
    """Run matrix products and attention in a lower precision with `torch.autocast`; weights keep their precision.

    float16 adds a `torch.amp.GradScaler`.
    """

    name = "amp"
    stage = Stage.STEP
    exact = False
    changes = "the precision of matrix products and attention"
    provides = frozenset({"autocast"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "↓",
        "gradient": "–",
        "optimizer_state": "–",
    }

    @dataclass(frozen=True)
    class Config:
        """The precision to use."""

        dtype: Literal["fp16", "bf16"] = "fp16"
        """The lower precision: fp16, with a gradient scaler, or bf16."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        if self.config.dtype == "fp16":
            self.provides = self.provides | {"gradient scaler"}

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """bf16 and fp16, without the one that the workload already uses."""
        offered = [cls.Config("bf16"), cls.Config("fp16")]
        return [config for config in offered if _DTYPES[config.dtype] is not workload.plan.autocast]

    def check(self, workload: Workload) -> list[Problem]:
        """Report 16-bit trainable weights with fp16.

        On CUDA, a gradient scaler cannot unscale 16-bit gradients (bfloat16: PyTorch issue 127176).
        """
        low = {p.dtype for p in workload.model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
        if _DTYPES[self.config.dtype] is torch.float16 and low:
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low))
            return [
                Problem(
                    f"dtype=fp16 needs a gradient scaler, which cannot unscale {names} gradients on a GPU",
                    "keep the trained weights in float32, or use dtype=bf16",
                )
            ]
        return []

    def apply(self, workload: Workload) -> None:
        """Set the autocast dtype and the gradient scaler."""
        dtype = _DTYPES[self.config.dtype]
        workload.plan = dataclasses.replace(workload.plan, autocast=dtype, grad_scaler=dtype is torch.float16)
