"""One training step, described once and run everywhere: simulated, measured, or trained for real.

A `Workload` says what to train and how one optimizer step goes; `run_step` is the only place that carries it out.
Whoever watches the step passes a `StepObserver`; nothing else differs between a simulation, a measurement and training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memscope.batch import leaves_of, map_leaves, tensors_in
from memscope.errors import TargetError, UsageError

__all__ = [
    "MicroBatch",
    "StepObserver",
    "StepPlan",
    "Training",
    "Workload",
    "micro_batches",
    "run_step",
    "sample_counts",
    "split_batch",
]

Scope = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class StepPlan:
    """How one optimizer step is carried out; strategies replace it with `dataclasses.replace`.

    Examples:
        >>> from dataclasses import replace
        >>> from memscope import StepPlan
        >>> replace(StepPlan(), micro_batches=4, clip_grad_norm=1.0)
        StepPlan(micro_batches=4, autocast=None, grad_scaler=False, clip_grad_norm=1.0, contexts=())
    """

    micro_batches: int = 1
    """Pieces the step's batch is split into; gradients accumulate over them."""
    autocast: torch.dtype | None = None
    """Lower-precision dtype of `torch.autocast` around forward and loss; None: no autocast."""
    grad_scaler: bool = False
    """Scale the loss with `torch.amp.GradScaler`; needed for float16 gradients."""
    clip_grad_norm: float | None = None
    """Largest total norm of the gradients; None: no clipping."""
    contexts: tuple[Scope, ...] = ()
    """Context managers entered around forward, loss and backward of each micro-batch, outermost first."""


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split a batch into `parts` pieces of equally many samples.

    The samples are the first dimension of every tensor, and the items of every list. Only a list that holds tensors,
    such as the `[inputs, labels]` of a `DataLoader`, is a list of columns, each of them to be split. Everything else
    goes into each piece as it is.

    Raises:
        UsageError: when the samples do not divide into `parts`, cannot be found, or differ in number.
    """
    if parts == 1:
        return [batch]
    counts = sample_counts(batch)
    if len(counts) != 1:
        found = " and ".join(map(str, counts)) or "none"
        raise UsageError(
            f"a step's batch of type {type(batch).__name__} cannot be split into {parts} micro-batches: expected one "
            f"number of samples in its tensors and lists, found {found}; give the workload a `split` of its own"
        )
    (samples,) = counts
    if samples == 0:
        raise UsageError(f"a step's batch is empty, it cannot be split into {parts} micro-batches: check the data")
    if samples % parts:
        raise UsageError(
            f"a step's batch of {samples} samples cannot be split into {parts} equal micro-batches: "
            f"choose a number of micro-batches that divides {samples}"
        )
    pieces = [slice(start, start + samples // parts) for start in range(0, samples, samples // parts)]
    return [map_leaves(partial(_part, piece), batch, _is_list_of_samples) for piece in pieces]


def sample_counts(batch: Any) -> list[int]:
    """Each number of samples that a tensor or list of a batch has, as `split_batch` counts them; normally just one."""
    return sorted({len(leaf) for leaf in leaves_of(batch, _is_list_of_samples) if _has_samples(leaf)})


def _part(piece: slice, leaf: Any) -> Any:
    return leaf[piece] if _has_samples(leaf) else leaf


def _is_list_of_samples(node: Any) -> bool:
    return isinstance(node, list) and not any(isinstance(item, Tensor) for item in node)


def _has_samples(leaf: Any) -> bool:
    return leaf.ndim > 0 if isinstance(leaf, Tensor) else isinstance(leaf, list)


def _samples(micro_batch: Any) -> float:
    return next((float(tensor.shape[0]) for tensor in tensors_in(micro_batch) if tensor.ndim), 1.0)


@dataclass
class Workload:
    """What is trained, and how one step goes. Works for any `nn.Module` and any `torch.optim.Optimizer`.

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
    """One item an optimizer step: its whole effective batch. Recorders repeat the first: it should need most memory."""
    loss: Callable[[nn.Module, Any], Tensor]
    """`loss(model, micro_batch)`: runs the forward pass and returns the mean loss, a scalar."""
    optimizer_factory: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    """Builds the optimizer from the trainable parameters; called last, after every strategy."""
    plan: StepPlan = field(default_factory=StepPlan)
    name: str = "workload"
    split: Callable[[Any, int], list[Any]] = split_batch
    """`split(batch, parts)`: the micro-batches of a step's batch. Default: every tensor along its first dimension."""
    weight: Callable[[Any], float] = _samples
    """What a micro-batch counts in the mean of its step, e.g. its number of target tokens. Default: its samples."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the target was configured with; kept in the trace."""

    def parameter_counts(self) -> tuple[int, int]:
        """`(total, trainable)` numbers of parameters, each tied parameter counted once."""
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@dataclass(frozen=True)
class MicroBatch:
    """One piece of a step's batch, still on the host, and its share of the step's loss (shares sum to 1)."""

    data: Any
    share: float


def micro_batches(workload: Workload, batch: Any) -> list[MicroBatch]:
    """Split one step's batch as the plan says; each piece is weighted so that accumulation equals the whole batch.

    A piece without any weight is left out: its mean loss would be 0 / 0.

    Raises:
        UsageError: when the batch cannot be split, or weighs nothing as a whole.
    """
    pieces = workload.split(batch, workload.plan.micro_batches)
    weights = [workload.weight(piece) for piece in pieces]
    total = sum(weights)
    if total <= 0:
        raise UsageError(
            "the batch of this step has no target token: nothing to learn from; "
            "check the labels (every one is masked) or leave such samples out"
        )
    return [MicroBatch(piece, weight / total) for piece, weight in zip(pieces, weights, strict=True) if weight]


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
