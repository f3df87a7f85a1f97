"""A `Workload`: the model to train, its data, loss and optimizer, and the plan of one optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memscope.workload.optimizer import OptimizerFactory
from memscope.workload.quantized import elements
from memscope.workload.split import first_dimension, split_batch

__all__ = ["HeadLoss", "Scope", "StepPlan", "Workload"]

Scope = Callable[[], contextlib.AbstractContextManager[Any]]
"""A function that returns a context manager."""


@dataclass(frozen=True)
class StepPlan:
    """How one optimizer step runs; strategies change it with `dataclasses.replace`.

    Examples:
        >>> from dataclasses import replace
        >>> from memscope import StepPlan
        >>> replace(StepPlan(), micro_batches=4).micro_batches
        4
    """

    micro_batches: int = 1
    """Number of micro-batches that the step's batch is split into; their gradients accumulate."""
    autocast: torch.dtype | None = None
    """Lower-precision dtype of `torch.autocast` around forward and loss; None: no autocast."""
    grad_scaler: bool = False
    """Scale the loss with `torch.amp.GradScaler`; needed for float16 gradients."""
    clip_grad_norm: float | None = None
    """Maximum total norm of the gradients; None: no clipping."""
    contexts: tuple[Scope, ...] = ()
    """Context managers entered around forward, loss and backward of each micro-batch, outermost first."""
    keep_batch: bool = False
    """Keep each micro-batch on the device until the next one is there, as a loop does whose variable holds it."""
    set_to_none: bool = True
    """Let go of the gradients after the step, as PyTorch does by default; False: keep them, filled with zeros."""
    step_in_backward: bool = False
    """Update each parameter as soon as its gradient is complete, inside the backward pass, and let go of the gradient.
    Neither micro-batches nor clipping nor a gradient scaler can be used with it: they need all gradients at once."""

    @property
    def prevents_step_in_backward(self) -> str:
        """What of the step needs all gradients before one parameter is updated; empty: nothing."""
        if self.micro_batches > 1:
            return f"the gradients of {self.micro_batches} micro-batches accumulate"
        if self.clip_grad_norm is not None:
            return f"the gradients are clipped to a total norm of {self.clip_grad_norm}"
        return "a GradScaler looks at all gradients before a step" if self.grad_scaler else ""


@dataclass(frozen=True)
class HeadLoss:
    """The output head of a language model and its loss, for strategies that compute both in parts (`loss`).

    The loss of the workload must be the mean cross-entropy of the head's logits, over the tokens with a label.
    """

    head: str
    """Name of the head, a linear module from `[..., dim]` to the logits `[..., vocabulary]`."""
    inputs: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
    """`inputs(model, micro_batch)`: the head's input `[..., dim]`, computed by the model without its head, and the
    label of each token `[...]`."""
    upcast: bool = False
    """Whether the logits are converted to float32 before the loss."""
    ignored: int = -100
    """Label of a token without a loss."""


@dataclass
class Workload:
    """A training task: any `nn.Module`, any `torch.optim.Optimizer`, their data and loss, and how one step runs.

    Without an optimizer (`optimizer_factory=None`) it is inference: the model is in evaluation mode, `loss` runs under
    `torch.inference_mode`, and there is no backward pass. Strategies that change training are refused.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memscope import Workload
        >>> workload = Workload(
        ...     model=nn.Linear(1024, 1024, bias=False),
        ...     batches=[torch.randn(8, 1024)],
        ...     loss=lambda model, x: model(x).square().mean(),
        ...     optimizer_factory=torch.optim.AdamW,
        ... )
        >>> workload.parameter_counts()
        (1048576, 1048576)
    """

    model: nn.Module
    """The model; strategies may change it in place before the first step."""
    batches: Sequence[Any]
    """One item per optimizer step: the whole effective batch. Recorders repeat the first, so put the largest first."""
    loss: Callable[[nn.Module, Any], Any]
    """`loss(model, micro_batch)`: runs the forward pass and returns the mean loss, a scalar; or `(loss, kept)`, where
    `kept`, such as the model's outputs, lives until the next call has returned, as variables of a training loop do.
    For inference it may return anything instead of the loss."""
    optimizer_factory: OptimizerFactory | None
    """`optimizer_factory(parameters)` builds the optimizer from the trainable parameters. A factory with a parameter
    named `model` is also given the model, whose `named_parameters` serve for groups such as those without weight decay.
    It is called last, after every strategy has been applied. None: inference."""
    plan: StepPlan = field(default_factory=StepPlan)
    name: str = "workload"
    split: Callable[[Any, int], list[Any]] = split_batch
    """`split(batch, parts)`: the micro-batches of a step's batch. Default: tensors are split along their first
    dimension, lists of samples by their items."""
    weight: Callable[[Any], float] = first_dimension
    """Weight of a micro-batch in the mean loss of its step, e.g. its number of target tokens. Default: its samples."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The target's settings; stored in the trace."""
    notes: Sequence[str] = ()
    """What a reader of the figures must know about the workload; tables, pages and JSON documents show it."""
    positions: int | None = None
    """Tokens of the longest sample that the model was made for; None: it has no such bound, or none is known."""
    packed: Callable[[Any, int], list[Any]] | None = None
    """As `split`, but the samples of each micro-batch are joined to one row without padding, in which each attends to
    itself alone; None: the model cannot be trained so."""
    head_loss: HeadLoss | None = None
    """The head and its loss, if the target can run its model without the head; None: it cannot."""

    def parameter_counts(self) -> tuple[int, int]:
        """`(total, trainable)` numbers of parameters, each tied parameter counted once."""
        parameters = list(self.model.parameters())
        return sum(map(elements, parameters)), sum(elements(p) for p in parameters if p.requires_grad)
