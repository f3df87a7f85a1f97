"""One training step: simulation, measurement and real training all run the same `run_step`.

They differ only in the `StepObserver` that watches the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memscope.errors import TargetError, UsageError, place_of, where
from memscope.workload.description import Workload
from memscope.workload.micro_batches import MicroBatch
from memscope.workload.optimizer import built_by
from memscope.workload.running import Running, StepObserver
from memscope.workload.step_in_backward import step_in_backward

__all__ = ["Training", "run_step"]


@dataclass(kw_only=True)
class Training(Running):
    """A started `Workload` with its optimizer and gradient scaler."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    gradients_are_taken: bool
    """Whether the target has hooks that run when a gradient is complete, and may take it before the step ends."""

    @classmethod
    def start(cls, workload: Workload, device_type: str, to_device: Callable[[Any], Any]) -> Training:
        """Build the optimizer and the gradient scaler. Called once, after every strategy has been applied.

        Raises:
            UsageError: the workload has no optimizer, no parameter is trainable, the optimizer has none of the
                trainable parameters, or a step in the backward pass is asked for beside what prevents it.
            TargetError: `optimizer_factory` fails.
        """
        if workload.optimizer_factory is None:
            raise UsageError(f'"{workload.name}" cannot be trained: it is for inference (optimizer_factory=None)')
        trainable = [p for p in workload.model.parameters() if p.requires_grad]
        if not trainable:
            raise UsageError(f'"{workload.name}" has no trainable parameter: nothing can be optimized')
        plan = workload.plan
        if plan.step_in_backward and plan.prevents_step_in_backward:
            raise UsageError(
                f'"{workload.name}" cannot update parameters in the backward pass: {plan.prevents_step_in_backward}'
            )
        scaler = torch.amp.GradScaler(device_type) if plan.grad_scaler else None
        workload.model.train()
        optimizer = _optimizer(workload, trainable)
        if plan.step_in_backward:
            step_in_backward(optimizer)
        return cls(
            workload=workload,
            device_type=device_type,
            to_device=to_device,
            optimizer=optimizer,
            scaler=scaler,
            gradients_are_taken=_are_taken(trainable),
        )


def _are_taken(parameters: list[nn.Parameter]) -> bool:
    return any(parameter._post_accumulate_grad_hooks for parameter in parameters)


def _optimizer(workload: Workload, trainable: list[nn.Parameter]) -> torch.optim.Optimizer:
    try:
        optimizer = built_by(workload.optimizer_factory, trainable, workload.model)
    except Exception as error:
        raise TargetError(
            f'"{workload.name}" failed: its optimizer cannot be built: {type(error).__name__}: {error}{where(error)}'
        ) from error
    if _are_taken(trainable):  # perhaps to copies, which the optimizer updates
        return optimizer
    given = {id(parameter) for parameter in trainable}
    if not any(id(parameter) in given for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            f'the optimizer of "{workload.name}" has none of the model\'s trainable parameters: '
            "build it from the parameters passed to optimizer_factory"
        )
    return optimizer


def run_step(training: Training, pieces: list[MicroBatch], observer: StepObserver | None = None) -> Tensor:
    """Run one optimizer step over the micro-batches in `pieces` and return the step's loss. Empties `pieces`.

    The loss of each micro-batch is multiplied by its share, so the accumulated gradient equals that of the whole batch.

    Raises:
        TargetError: no parameter of the optimizer got a gradient.
    """
    plan = training.workload.plan
    mark = observer.phase if observer else _unobserved
    total: Tensor | None = None
    index = 0
    while pieces:
        piece = pieces.pop(0)
        mark("forward", index)
        with contextlib.ExitStack() as scopes:
            for scope in plan.contexts:
                scopes.enter_context(scope())
            loss = _require_loss(training.call(piece.data, observer), training.workload)
            loss = loss if piece.share == 1.0 else loss * piece.share
            mark("backward", index)
            (training.scaler.scale(loss) if training.scaler else loss).backward()
        total = loss.detach() if total is None else total + loss.detach()
        del loss, piece
        index += 1
    assert total is not None, "run_step needs at least one micro-batch"
    _require_gradient(training)
    if not plan.step_in_backward:
        mark("optimizer", index - 1)
        _update(training)
    mark("zero_grad", index - 1)
    training.optimizer.zero_grad(set_to_none=plan.set_to_none)
    return total


def _update(training: Training) -> None:
    """Clip the gradients and update all parameters."""
    plan, scaler, optimizer = training.workload.plan, training.scaler, training.optimizer
    if plan.clip_grad_norm is not None:
        if scaler:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(training.workload.model.parameters(), plan.clip_grad_norm)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()


def _require_gradient(training: Training) -> None:
    """Refuse a step that would train nothing. Hooks may have used up the gradients, as an optimizer in them does."""
    given = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    if any(parameter.grad is not None for parameter in given) or training.gradients_are_taken:
        return
    raise TargetError(
        f'the backward pass of "{training.workload.name}" gave none of the {len(given)} tensors that the optimizer '
        "updates a gradient: compute the loss with the model that loss(model, batch) is given, not with another one, "
        "and without detach() or torch.no_grad()"
    )


def _require_loss(loss: object, workload: Workload) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    what = "None" if loss is None else f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        what = f"a tensor of shape {[*loss.shape]}"
    raise TargetError(
        f'the loss of "{workload.name}" returned {what}, not a tensor with one element: '
        f"end it with `return loss`, the mean over the micro-batch{place_of(workload.loss)}"
    )


def _unobserved(name: str, micro_batch: int) -> None:
    pass
