"""What a started workload keeps from step to step, whether it trains or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memscope.workload.description import Workload

__all__ = ["Running", "StepObserver"]


class StepObserver(Protocol):
    """Receives each phase of a step as it begins, and the inputs once they are on the device."""

    def phase(self, name: str, micro_batch: int) -> None:
        """Phase `name` (forward, backward, optimizer, zero_grad or inference) begins; it lasts until the next call."""

    def inputs(self, data: Any) -> None:
        """The micro-batch `data` is on the device."""


@dataclass(kw_only=True)
class Running:
    """A started `Workload`: the objects that live from step to step."""

    workload: Workload
    device_type: str
    to_device: Callable[[Any], Any]
    batch: Any = None
    """The last micro-batch on the device, with `StepPlan.keep_batch`."""
    kept: Any = None
    """What the last loss returned beside the loss."""

    def call(self, data: Any, observer: StepObserver | None) -> Any:
        """Move a micro-batch to the device and return the workload's loss on it; keep what comes beside the loss."""
        data = self.to_device(data)
        plan = self.workload.plan
        if plan.keep_batch:
            self.batch = data
        if observer:
            observer.inputs(data)
        with torch.autocast(self.device_type, dtype=plan.autocast) if plan.autocast else contextlib.nullcontext():
            found = self.workload.loss(self.workload.model, data)
        one, self.kept = found if type(found) is tuple and len(found) == 2 else (found, None)
        return one
