"""Gradients of views that a target writes into, as autograd makes them on plain tensors.

On a plain tensor, autograd then replaces the history of the view by one `as_strided` of its base, whose backward pass
makes zeros as large as the base and writes the gradient into them. On tensor subclasses it repeats the operators that
made the view: the backward pass of `transpose` or `view` makes nothing. That of `slice` and its like makes a tensor
as large as the base as well, so only views of the whole base differ.

Sources: VariableHooks::grad_fn in torch/csrc/autograd/variable.cpp, as_strided_backward in FunctionsManual.cpp there;
`is_python_dispatch` in tools/autograd/gen_inplace_or_view_type.py (2.6 to 2.13).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from memscope.hooks.work import Execute, Work

__all__ = ["WrittenViews"]


class WrittenViews:
    """Runs operators with `execute`; follows those that write into views."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._written: list[Any] = []

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """Return the result of `execute(func, args, kwargs)`."""
        if self._written:
            self._prepare(args)
        found = self._execute(func, args, kwargs)
        if _writes(func) and args and type(args[0]) is FakeTensor and torch.is_grad_enabled():
            view = args[0]
            if view._is_view() and view.numel() == view._base.numel():  # type: ignore[union-attr]
                self._written.append(TensorWeakRef(view))
        return found

    def _prepare(self, args: tuple[Any, ...]) -> None:
        """Prepare the views that an operator reads. Others wait: autograd may be about to repeat what made them."""
        read = {id(leaf) for arg in args for leaf in (arg if isinstance(arg, (list, tuple)) else (arg,))}
        waiting = []
        for reference in self._written:
            view = reference()
            if view is not None and id(view) in read:
                _place_gradient(view)
            elif view is not None:
                waiting.append(reference)
        self._written = waiting


@functools.cache
def _writes(func: Any) -> bool:
    name = func.__name__  # such as add_.Tensor
    return name[: name.find(".")].endswith("_") and not name.startswith("_")


@dataclass(frozen=True)
class _Place:
    """Where the elements of a view lie in the part of a storage that its base and itself show."""

    elements: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor] | None:
        """The gradient of the view, in zeros as large as the base."""
        gradient = gradients[0]
        if gradient is None:
            return None
        placed = gradient.new_zeros(self.elements).as_strided(self.size, self.stride, self.offset)
        return (placed.copy_(gradient),)


def _place_gradient(view: Tensor) -> None:
    base: Any = view._base
    if not view.requires_grad:
        return
    first = min(base.storage_offset(), view.storage_offset())
    elements = max(_extent(base), _extent(view)) - first
    with _autograd():
        history = view.grad_fn
    if history is not None:
        history.register_prehook(_Place(elements, view.size(), view.stride(), view.storage_offset() - first))


def _extent(tensor: Tensor) -> int:
    """Elements of a storage up to the last that a tensor shows."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return int(tensor.storage_offset()) + 1 + sum(steps) if tensor.numel() else 0


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Let autograd see operators, as it does not below a dispatch mode: it repeats those that made a view."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


_AUTOGRAD = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.ADInplaceOrView,
)
