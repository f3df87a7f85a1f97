"""Operations that autograd runs in place on plain tensors, but out of place on fake tensors.

Where several gradients reach one tensor, autograd's engine adds them into the first one, provided that nothing else
holds it. Backward formulas that put a gradient into zeros write into those zeros. On tensor subclasses, and under any
dispatch mode, PyTorch does neither (`isTensorSubclassLike` in aten/src/ATen/TensorSubclassLikeUtils.h): without this
module, each of these operations would allocate its result a second time.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch.autograd import graph
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.hooks.work import Execute, Work

__all__ = ["PlainAutograd"]

aten = torch.ops.aten
_RUN_BACKWARD = graph._engine_run_backward.__code__
_current_task = torch._C._current_graph_task_id

_INTO_ZEROS = {
    aten.scatter.src: aten.scatter_.src,  # value_selecting_reduction_backward: the gradient of max and min
    aten.scatter_add.default: aten.scatter_add_.default,  # gather_backward, cummaxmin_backward
    aten.index_add.default: aten.index_add_.default,  # index_select_backward
    aten.index_put.default: aten.index_put_.default,  # index_backward
    aten.put.default: aten.put_.default,  # take_backward
}
"""Operators that backward formulas call on zeros they have just made, and their in-place variants.

Sources: aten/src/ATen/native/TensorAdvancedIndexing.cpp and ReduceOps.cpp, torch/csrc/autograd/FunctionsManual.cpp,
revisions from before 2.6 to after 2.8. Observed on GPUs with 2.6 and 2.11: `scatter`, `scatter_add` and `index_put`.
"""


class PlainAutograd:
    """Runs operators with `execute`; runs those that autograd's engine calls as the engine would on plain tensors."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._counts = _counts_of_last_reference()

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """Return the result of `execute(func, args, kwargs)`; the first argument where PyTorch changes it in place."""
        if (func is aten.add.Tensor or func in _INTO_ZEROS) and _current_task() >= 0 and not torch.is_grad_enabled():
            # The caller of the operator is two frames up: the engine's own code, or a backward written in Python.
            called_by_engine = sys._getframe(2).f_code is _RUN_BACKWARD
            in_place = _in_place(func, args, kwargs, self._counts) if called_by_engine else None
            return self._execute(in_place or func, args, kwargs)
        return self._execute(func, args, kwargs)


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], last_reference: tuple[int, int]) -> Any:
    """The in-place operator that PyTorch calls on plain tensors; None where it calls `func` itself.

    PyTorch's own backward formulas that add out of place cannot be told from the engine: they add what they made.

    Source: can_accumulate_inplace and accumulate in torch/csrc/autograd/input_buffer.cpp, revisions from before 2.6 to
    after 2.8.
    """
    if func is aten.add.Tensor:
        may = not kwargs and len(args) == 2 and isinstance(args[1], torch.Tensor) and args[0].shape == args[1].shape
        free = may and _counts(args[0]) == last_reference and _is_dense(args[0])
        return aten.add_.Tensor if free else None
    accumulates = func not in (aten.index_put.default, aten.put.default) or args[3:] == (True,)
    return _INTO_ZEROS[func] if accumulates else None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _counts(tensor: torch.Tensor) -> tuple[int, int]:
    """Reference counts of a tensor and of its storage."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


@functools.cache
def _counts_of_last_reference() -> tuple[int, int]:
    """Return `_counts` of a gradient that only the engine holds, as observed in a dispatch mode."""
    found: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.add.Tensor and _current_task() >= 0:
                found.append(_counts(args[0]))
            return func(*args, **(kwargs or {}))

    with Watch(), torch.enable_grad():  # type: ignore[no-untyped-call]
        middle = torch.ones((), requires_grad=True) * 1
        (middle * 2 + middle * 3).backward()
    return found[0]
