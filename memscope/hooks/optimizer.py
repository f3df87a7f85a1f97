"""Categorize gradients and optimizer state as they appear, for any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from memscope.hooks.lifetimes import Lifetimes
from memscope.hooks.modules import ModuleStack
from memscope.hooks.paged import is_paged

__all__ = ["GradientNamer", "OptimizerNamer"]


class GradientNamer:
    """Categorizes the storage of every parameter's `.grad` as soon as the gradient is accumulated."""

    def __init__(self, lifetimes: Lifetimes, modules: ModuleStack) -> None:
        self._lifetimes, self._modules = lifetimes, modules
        # By id of the parameter, which is kept alive so that its id is not reused.
        self._hooks: dict[int, tuple[Tensor, Any]] = {}

    def __enter__(self) -> GradientNamer:
        self.refresh()
        return self

    def refresh(self) -> None:
        """Add hooks to parameters that require a gradient since the last call."""
        hooks = self._hooks
        for model in self._modules.models.values():
            for parameter in model.parameters():
                if id(parameter) not in hooks and parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(self._name)
                    hooks[id(parameter)] = parameter, hook
                    _call_first(parameter, hook)

    def __exit__(self, *exception: object) -> None:
        for _, hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def _name(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._lifetimes.own(parameter.grad, "gradient", module=self._modules.of_parameter(parameter))


def _call_first(parameter: Any, hook: Any) -> None:
    """Call a hook before those that were there: an optimizer in one of them lets go of the gradient."""
    every = parameter._post_accumulate_grad_hooks
    for key in [key for key in every if key != hook.id]:
        every[key] = every.pop(key)


class OptimizerNamer:
    """Calls back around every optimizer step in the process, and categorizes the optimizer state after it."""

    def __init__(
        self,
        lifetimes: Lifetimes,
        modules: ModuleStack,
        *,
        before: Callable[[torch.optim.Optimizer], None],
        after: Callable[[torch.optim.Optimizer], None],
        on_gpu: bool,
    ) -> None:
        """Prepare to follow; `on_gpu`: the optimizer runs as on a GPU, where `step` counters may stay on the host."""
        self._lifetimes, self._modules, self._on_gpu = lifetimes, modules, on_gpu
        self._before, self._after = before, after
        self._hooks: list[Any] = []
        self._paged: dict[int, dict[int, int]] = {}

    def __enter__(self) -> OptimizerNamer:
        self._hooks = [
            register_optimizer_step_pre_hook(self._steps),
            register_optimizer_step_post_hook(self._stepped),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _steps(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._before(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # gradients that autograd did not accumulate, as in FSDP2
                    self._lifetimes.own(parameter.grad, "gradient", module=self._modules.of_parameter(parameter))

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.name_state(optimizer)
        self._after(optimizer)

    @property
    def paged_bytes(self) -> int:
        """Bytes of paged state of all optimizers."""
        return sum(sum(sizes.values()) for sizes in self._paged.values())

    def name_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Categorize every tensor in the optimizer's state, except step counters on the host.

        An object in the state may hold tensors too, as GaLore's projectors do.
        """
        paged = self._paged[id(optimizer)] = {}
        for group in optimizer.param_groups:
            counters_on_host = self._on_gpu and not (group.get("capturable") or group.get("fused"))
            for parameter in group["params"]:
                module = self._modules.of_parameter(parameter)
                for key, value in optimizer.state.get(parameter, {}).items():
                    if counters_on_host and key == "step":
                        continue
                    for leaf in (value,) if isinstance(value, Tensor) else _tensors_in(value):
                        if is_paged(leaf):
                            paged[id(leaf)] = leaf.nbytes
                        self._lifetimes.own(leaf, "optimizer_state", module=module)


def _tensors_in(value: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(value)
    objects = [one for one in leaves if hasattr(one, "__dict__") and not isinstance(one, Tensor)]
    held = pytree.tree_leaves([list(vars(one).values()) for one in objects])
    tensors = [one for one in (*leaves, *held) if isinstance(one, Tensor)]
    return [one for one in tensors if not isinstance(one, nn.Parameter)]
