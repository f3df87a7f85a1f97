"""The work of operators, summed by position in the run: FLOPs and, in a simulation, bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

__all__ = ["NOTHING", "CountedFlops", "Execute", "Work", "WorkDone", "WorkKey", "flops_of", "has_formula"]

WorkKey: TypeAlias = tuple[int, int, int, int, int]
"""Step, micro-batch, and indices of phase, module and operator."""


class Work(NamedTuple):
    """The work of one call of an operator."""

    flops: int
    """Floating-point operations of matrix products, convolutions and attention (`torch.utils.flop_counter`)."""
    moved_bytes: int
    """Bytes read from and written to device memory; 0 if not estimated."""
    seconds: float
    """Estimated seconds; 0 if not estimated."""


NOTHING = Work(0, 0, 0.0)
"""The work of a call that runs no kernel, or whose work is not counted."""

Execute = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Any, Work]]
"""A function `execute(func, args, kwargs)` that runs an operator and returns its result and its work."""


class WorkDone:
    """The work of a run.

    Attributes:
        sums: by key: number of calls that did work, their floating-point operations, bytes and seconds.
    """

    def __init__(self) -> None:
        self.sums: dict[WorkKey, list[Any]] = {}

    def add(self, key: WorkKey, work: Work) -> None:
        """Add one call."""
        total = self.sums.get(key)
        if total is None:
            self.sums[key] = [1, *work]
            return
        total[0] += 1
        total[1] += work.flops
        total[2] += work.moved_bytes
        total[3] += work.seconds

    def flops_of_step(self, step: int) -> int:
        """Floating-point operations of one step."""
        return sum(flops for (key_step, *_), (_, flops, *_) in self.sums.items() if key_step == step)


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of one call by PyTorch's formula; 0 for an operator without a formula."""
    formula = _formula(func)
    if formula is None:
        return 0
    shapes = [arg for arg in args if not isinstance(arg, torch.dtype)]  # of the result, as in addmm.dtype
    flops: int = formula(*shapes, **kwargs, out_val=out)
    return flops


def has_formula(func: Any) -> bool:
    """Whether there is a formula for the floating-point operations of an operator."""
    return _formula(func) is not None


def _formula(func: Any) -> Callable[..., int] | None:
    packet = func._overloadpacket
    return flop_registry.get(packet) or _FORMULAS.get(packet._qualified_op_name)


def _linear_cross_entropy(rows: Any, weight: Any, *others: Any, out_val: Any = None, **kwargs: Any) -> int:
    """The product of input and weight, and one more for each of their gradients that is computed.

    Source: torch/nn/modules/linear_cross_entropy.py (2.13).
    """
    *_, for_input, for_weight, _ = others
    return int(2 * rows.shape[0] * weight.shape[0] * weight.shape[1] * (1 + for_input + for_weight))


_FORMULAS: dict[str, Callable[..., int]] = {"torch_nn::_linear_cross_entropy_batch_chunked": _linear_cross_entropy}
"""Operators of which PyTorch counts no floating-point operations."""


class CountedFlops:
    """Floating-point operations by combination of shapes, computed once each, because PyTorch's formulas are slow."""

    def __init__(self) -> None:
        self._known: dict[Any, Work] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
        """The work of one call of an operator that has a formula."""
        key = (func, *(a.size() if isinstance(a, Tensor) else a for a in args))
        try:
            known = self._known.get(key)
        except TypeError:  # a list among the arguments, such as the strides of a convolution
            return Work(flops_of(func, args, kwargs, out), 0, 0.0)
        if known is None:
            known = self._known[key] = Work(flops_of(func, args, kwargs, out), 0, 0.0)
        return known
