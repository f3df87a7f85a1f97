"""The optimizer inside the backward pass: a parameter is updated once its gradient is complete, which then dies.

PyTorch's tutorial *How to save memory by fusing the optimizer step into the backward pass* and torchtune's
`OptimizerInBackward` (torchtune/training/memory.py, 0.6) build one optimizer for each parameter. So does this, from
the optimizer of the workload: it keeps the state of all parameters, and what is changed in its groups, such as a
learning rate, holds for theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["step_in_backward"]


def step_in_backward(optimizer: Optimizer) -> None:
    """Let an optimizer update each of its parameters in the backward pass; its own `step` is not called any more."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(_OneParameter(optimizer, group, parameter))


class _OneParameter:
    """A hook that updates one parameter and lets go of its gradient."""

    def __init__(self, whole: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        self._whole, self._group = whole, group
        self._seen = dict(_options(group))
        self._own: Any = object.__new__(type(whole))
        vars(self._own).update(vars(whole))
        self._own.param_groups = [{**group, "params": [parameter]}]

    def __call__(self, parameter: Tensor) -> None:
        changed = {key: value for key, value in _options(self._group) if self._seen.get(key) is not value}
        self._own.param_groups[0].update(changed)  # what the optimizer itself counts in a group stays its own
        self._seen.update(changed)
        self._own.state = self._whole.state
        self._own.step()
        parameter.grad = None


def _options(group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in group.items() if key not in ("params", "param_names"))
