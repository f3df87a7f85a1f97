"""One training step, carried out: `run_step` is the same for a simulation, a measurement and real training.

A `StepObserver` watches the step; nothing else differs between the three.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memscope.errors import TargetError, UsageError
from memscope.workload.description import Workload
from memscope.workload.micro_batches import MicroBatch

__all__ = ["StepObserver", "Training", "run_step"]


class StepObserver(Protocol):
    """Who watches a step: told what is about to happen, and shown the inputs when they are on the device."""

    def phase(self, name: str, micro_batch: int) -> None:
        """`name` is one of forward, backward, optimizer, zero_grad; it lasts until the next call."""

    def inputs(self, data: Any) -> None:
        """The micro-batch, moved to the device."""


@dataclass
class Training:
    """The things that live from step to step: what a `Workload` becomes when it starts."""

    workload: Workload
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    device_type: str
    to_device: Callable[[Any], Any]

    @classmethod
    def start(cls, workload: Workload, device_type: str, to_device: Callable[[Any], Any]) -> Training:
        """Build optimizer and scaler. Called once, after every strategy has been applied.

        Raises:
            UsageError: when no parameter is trainable.
        """
        trainable = [p for p in workload.model.parameters() if p.requires_grad]
        if not trainable:
            raise UsageError(f'"{workload.name}" has no trainable parameter: nothing can be optimized')
        scaler = torch.amp.GradScaler(device_type) if workload.plan.grad_scaler else None
        workload.model.train()
        return cls(workload, _optimizer(workload, trainable), scaler, device_type, to_device)


def _optimizer(workload: Workload, trainable: list[nn.Parameter]) -> torch.optim.Optimizer:
    try:
        optimizer = workload.optimizer_factory(trainable)
    except Exception as error:
        raise TargetError(
            f'"{workload.name}" failed: its optimizer cannot be built: {type(error).__name__}: {error}'
        ) from error
    given = {id(parameter) for parameter in trainable}
    if not any(id(parameter) in given for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            f'the optimizer of "{workload.name}" has none of the model\'s parameters: '
            "build it from those that optimizer_factory is given"
        )
    return optimizer


def run_step(training: Training, pieces: list[MicroBatch], observer: StepObserver | None = None) -> Tensor:
    """Carry out one optimizer step over the micro-batches of `pieces` (emptied on the way) and return the step's loss.

    The loss of each piece is multiplied by its share, so the accumulated gradient is that of the whole batch at once.
    """
    plan, model = training.workload.plan, training.workload.model
    mark = observer.phase if observer else _unobserved
    total: Tensor | None = None
    index = 0
    while pieces:
        piece = pieces.pop(0)
        mark("forward", index)
        with contextlib.ExitStack() as scopes:
            for scope in plan.contexts:
                scopes.enter_context(scope())
            loss = _forward(training, model, piece, observer)
            mark("backward", index)
            (training.scaler.scale(loss) if training.scaler else loss).backward()
        total = loss.detach() if total is None else total + loss.detach()
        del loss, piece
        index += 1
    assert total is not None, "run_step needs at least one micro-batch"
    mark("optimizer", index - 1)
    if plan.clip_grad_norm is not None:
        if training.scaler:
            training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip_grad_norm)
    if training.scaler:
        training.scaler.step(training.optimizer)
        training.scaler.update()
    else:
        training.optimizer.step()
    mark("zero_grad", index - 1)
    training.optimizer.zero_grad(set_to_none=True)
    return total


def _forward(training: Training, model: nn.Module, piece: MicroBatch, observer: StepObserver | None) -> Tensor:
    data = training.to_device(piece.data)
    if observer:
        observer.inputs(data)
    dtype = training.workload.plan.autocast
    with torch.autocast(training.device_type, dtype=dtype) if dtype else contextlib.nullcontext():
        loss = training.workload.loss(model, data)
    return loss if piece.share == 1.0 else loss * piece.share


def _unobserved(name: str, micro_batch: int) -> None:
    pass
