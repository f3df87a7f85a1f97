"""The optimizer's step inside the backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from memscope.strategies import Problem, Stage, Strategy
from memscope.workload.description import Workload
from memscope.workload.optimizer import built_or_none

__all__ = ["BackwardStep"]

_BY_PARAMETER = ("torch.optim", "torchao.optim", "bitsandbytes.optim", "transformers.optimization")
"""Packages whose optimizers update each parameter from its own gradient and state alone."""


class BackwardStep(Strategy):
    """Update each parameter in the backward pass as soon as its gradient is complete, so that gradients die at once.

    Accumulation, clipping by the total norm and a gradient scaler need all gradients at once and cannot be combined
    with it.
    """

    name = "backward-step"
    stage = Stage.STEP
    exact = True
    trains = "the optimizer's step"
    changes = "the updates of an optimizer that looks at several parameters at once"
    takes_more = "the gradients from what looks at them after the backward pass"
    conflicts = frozenset({"accumulation", "gradient scaler", "optimizer on the host"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "–",
        "gradient": "↓",
        "optimizer_state": "–",
        "computation": "–",
    }

    @dataclass(frozen=True)
    class Config:
        """No settings."""

    def check(self, workload: Workload) -> list[Problem]:
        """Report a step, or an optimizer, that needs all gradients at once."""
        found = []
        if why := workload.plan.prevents_step_in_backward:
            found.append(Problem(f"{why}, and here each gradient dies as soon as it is complete", _FIXES))
        if isinstance(built_or_none(workload.optimizer_factory, workload.model), torch.optim.LBFGS):
            found.append(Problem("LBFGS updates all parameters at once", "train with another optimizer"))
        return found

    def is_exact(self, workload: Workload) -> bool:
        """Whether the optimizer is known to update each parameter on its own."""
        optimizer = built_or_none(workload.optimizer_factory, workload.model)
        return optimizer is None or type(optimizer).__module__.startswith(_BY_PARAMETER)

    def apply(self, workload: Workload) -> None:
        """Set the step in the backward pass."""
        workload.plan = dataclasses.replace(workload.plan, step_in_backward=True)


_FIXES = "train with one micro-batch, without clipping and without a GradScaler; or leave this strategy out"
