"""The optimizer on the host: torchao's `CPUOffloadOptimizer` in place of the workload's.

Source: torchao/optim/cpu_offload.py (0.18.0). Pinned copies of each weight and its gradient, and the optimizer's state
are on the host. The gradient is copied as soon as it is complete; the step runs on the host's processor, after which
the weight is copied back. Both copies run on a stream of their own.
"""

from __future__ import annotations

import inspect
import logging
from importlib.util import find_spec
from typing import Any

from torch.optim import Optimizer

__all__ = ["is_installed", "on_host", "why_not_on_host"]

_CHOOSES_ITSELF = ("foreach", "fused")
"""Options for which None leaves the choice to the optimizer, or to torchao."""


def is_installed() -> bool:
    """Whether torchao is."""
    return find_spec("torchao") is not None


def why_not_on_host(optimizer: Optimizer) -> str:
    """Why an optimizer cannot be built again for copies of its parameters; empty if it can."""
    taken = inspect.signature(type(optimizer)).parameters
    known = {"params", *optimizer.defaults}
    lost = [key for key, one in taken.items() if key not in known and one.default is one.empty]
    if lost:
        return f'its defaults do not contain "{lost[0]}"'
    return "it needs a closure" if type(optimizer).__name__ == "LBFGS" else ""


def on_host(optimizer: Optimizer, *, frees_gradients: bool) -> Optimizer:
    """The same optimizer on the host; itself if its parameters are not on a GPU."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter.is_cuda for parameter in parameters):
        return optimizer
    offloading = _torchao()
    taken = inspect.signature(type(optimizer)).parameters
    arguments = {key: value for key, value in _given(optimizer.defaults).items() if key in taken}
    groups = [_given(group) for group in optimizer.param_groups]
    return offloading(groups, type(optimizer), offload_gradients=frees_gradients, **arguments)  # type: ignore[no-any-return]


def _torchao() -> Any:
    """The class of torchao. Its import warns of kernels that it does not find, which are for other things."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao.optim import CPUOffloadOptimizer
    finally:
        logging.disable(before)
    return CPUOffloadOptimizer


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Options without those that leave a choice."""
    return {key: value for key, value in options.items() if key not in _CHOOSES_ITSELF or value is not None}
