"""Keep a part of the step's memory on the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.ckpt.layers import repeated_layers
from memscope.strategies.offload.activations import Offloaded
from memscope.strategies.offload.optimizer import is_installed, on_host, why_not_on_host
from memscope.strategies.offload.parameters import LayersOnHost, frozen_weights
from memscope.workload.description import Workload
from memscope.workload.optimizer import built_by, built_or_none
from memscope.workload.settings import setting

__all__ = ["Offload"]


class Offload(Strategy):
    """Keep activations, frozen weights or the optimizer on the host, and copy over the bus. On the CPU, nothing moves.

    To offload the activations of chosen layers, use a checkpoint plan (`ckpt:plan=FILE`).
    """

    name = "offload"
    stage = Stage.STEP
    exact = True
    trains = "what the backward pass and the optimizer keep"
    changes = "the updates, which the host's processor computes with another order of operations"
    takes_more = "memory of the host"
    textbook: ClassVar[Mapping[str, str]] = {"parameter": "–", "computation": "–"}

    @dataclass(frozen=True)
    class Config:
        """What is on the host; activations, if nothing is named."""

        activations: bool = False
        """Copy what autograd saves for the backward pass, in model and loss, to pinned memory, and back when it is
        needed. No work hides the copies."""
        parameters: bool = False
        """Keep the frozen weights of the layers in pinned memory; they are on the GPU while their layer runs, forward
        or backward. Trained weights stay on the GPU."""
        optimizer: bool = False
        """Update copies of the weights on the host (torchao's CPUOffloadOptimizer); weights and gradients cross the bus
        once a step. Tensors of fewer than 4,096 elements stay on the GPU."""
        free_gradients: bool = setting("free-gradients", False)
        """With optimizer: free each gradient as soon as it is copied; not with accumulation."""

        def __post_init__(self) -> None:
            if self.free_gradients and not self.optimizer:
                raise ValueError("free-gradients goes with optimizer: write offload:optimizer,free-gradients=true")

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        if self.config.optimizer:
            self.provides = self.provides | {"optimizer on the host"}
            self.conflicts = self.conflicts | {"gradient scaler"}
        if self.config.free_gradients:
            self.conflicts = self.conflicts | {"accumulation"}

    @property
    def _moves_activations(self) -> bool:
        return bool(self.config.activations) or not (self.config.optimizer or self.config.parameters)

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """Activations, the optimizer, and frozen weights if there are any."""
        frozen = any(
            next(frozen_weights(layer), None) is not None for layer in repeated_layers(workload.model).values()
        )
        offered = [cls.Config(activations=True), cls.Config(optimizer=True), cls.Config(parameters=True)]
        return offered if frozen else offered[:2]

    def check(self, workload: Workload) -> list[Problem]:
        """Report an optimizer that cannot be on the host, or a model without layers."""
        found = list(self._problems(workload)) if self.config.optimizer else []
        if self.config.parameters and not repeated_layers(workload.model):
            what = "parameters: the model has no list of repeated layers (nn.ModuleList or nn.Sequential)"
            found.append(Problem(what, "leave parameters out"))
        return found

    def _problems(self, workload: Workload) -> Iterator[Problem]:
        if not is_installed():
            what = "optimizer is torchao's CPUOffloadOptimizer, and torchao is not installed"
            yield Problem(what, 'pip install "torch-memscope[torchao]"')
        plan = workload.plan
        if plan.clip_grad_norm is not None or plan.grad_scaler:
            what = "gradients are copied to the host before they are clipped or unscaled"
            yield Problem(what, "leave clipping by the total norm and the GradScaler out")
        if plan.micro_batches > 1 and self.config.free_gradients:
            what = f"free-gradients: the gradients of {plan.micro_batches} micro-batches accumulate on the GPU"
            yield Problem(what, "leave free-gradients out")
        optimizer = built_or_none(workload.optimizer_factory, workload.model)
        if optimizer is not None and (why := why_not_on_host(optimizer)):
            yield Problem(f"{type(optimizer).__name__} cannot be on the host: {why}", "train with AdamW, for example")

    def is_exact(self, workload: Workload) -> bool:
        """Whether nothing but activations moves."""
        return not self.config.optimizer

    def apply(self, workload: Workload) -> None:
        """Wrap the loss, or the optimizer's factory.

        Raises:
            UsageError: every weight of the layers is trained.
        """
        if self.config.parameters:
            self._move_weights(workload)
        if self._moves_activations:
            workload.loss = Offloaded(workload.model, workload.loss)
        if self.config.optimizer:
            build, frees = workload.optimizer_factory, self.config.free_gradients
            workload.optimizer_factory = lambda parameters, model: on_host(
                built_by(build, parameters, model), frees_gradients=frees
            )

    def _move_weights(self, workload: Workload) -> None:
        """Move the frozen weights of the layers once the model is on its device."""
        layers = list(repeated_layers(workload.model).values())
        frozen = [weight for layer in layers for weight in frozen_weights(layer)]
        if not frozen:
            raise UsageError(
                "offload:parameters moves frozen weights, but every weight of the layers is trained: train adapters "
                "(lora), or leave parameters out"
            )
        build = workload.optimizer_factory

        def build_on_device(parameters: Iterable[Any], model: nn.Module) -> Optimizer:
            if any(weight.is_cuda for weight in frozen):
                LayersOnHost(layers)
            return built_by(build, parameters, model)

        workload.optimizer_factory = build_on_device
