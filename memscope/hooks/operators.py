"""Properties of operators that a tracker needs, looked up once per operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from memscope.hooks.kernels import Kernels
from memscope.hooks.work import has_formula

__all__ = ["RESIZE", "KnownOperator", "Operators"]

_has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
RESIZE = 1
"""Code of `UntypedStorage.resize_`, which no dispatch mode sees."""
_NOTES = {
    "aten.record_stream.default": (
        "record_stream was called: memory counts as freed when its tensor dies, although other streams may still use it"
    )
}
"""Operator → what its call means for the trace."""
_WITHOUT_WORKSPACE = {
    "aten._linalg_svd.default": "a singular value decomposition takes a workspace of cuSOLVER, which is not counted"
}
"""Operator → what the kernel workspace model leaves out."""


def _is_composite(name: str) -> bool:
    return _has_kernel(name, "CompositeImplicitAutograd") and not _has_kernel(name, "CPU")


class KnownOperator(NamedTuple):
    """Properties of an operator; `code` indexes `Operators.names`."""

    code: int
    run: Callable[..., Any]
    """The operator itself, without the Python function around it."""
    has_flops: bool
    """Whether PyTorch has a formula for its floating-point operations."""
    is_copy: bool
    is_composite: bool
    """Whether its kernel consists of other operators. Autograd takes it apart, except under inference mode and inside
    wrapper subclasses."""
    makes_host_scalar: bool
    takes_workspace: bool
    has_own_order: bool
    """Whether its kernel may allocate results in another order than it returns them, or leave some on the host."""
    is_special: bool
    """Whether its results need a closer look: `is_copy`, `makes_host_scalar` or `has_own_order`."""
    is_plain: bool
    """Whether none of the above holds."""


class Operators:
    """The operators met so far.

    Attributes:
        names: names of the operators; the first is empty, for allocations made by no operator.
        known: properties of each operator, by its id: operators live as long as the process, and hash slowly.
        notes: what the operators mean for the trace as a whole.
    """

    def __init__(self, *, host_scalars: bool, kernels: Kernels | None) -> None:
        """See `StorageTracker`."""
        self.names = ["", "UntypedStorage.resize_"]
        self.known: dict[int, KnownOperator] = {}
        self.notes: list[str] = []
        self._host_scalars, self._kernels = host_scalars, kernels

    def learn(self, func: OpOverload) -> KnownOperator:
        """Add an operator that is not known yet."""
        name = str(func)
        self.names.append(name)
        if name in _NOTES:
            self.notes.append(_NOTES[name])
        if self._kernels is not None and name in _WITHOUT_WORKSPACE:
            self.notes.append(_WITHOUT_WORKSPACE[name])
        is_copy = name == "aten._to_copy.default"
        makes_host_scalar = self._host_scalars and name == "aten.lift_fresh.default"
        has_own_order = self._kernels is not None and self._kernels.has_own_order(name)
        is_special = is_copy or makes_host_scalar or has_own_order
        is_composite = func.namespace != "prim" and _is_composite(func.name())
        takes_workspace = self._kernels is not None and self._kernels.covers(name)
        has_flops = has_formula(func)
        op = self.known[id(func)] = KnownOperator(
            code=len(self.names) - 1,
            run=func._op,
            has_flops=has_flops,
            is_copy=is_copy,
            is_composite=is_composite,
            makes_host_scalar=makes_host_scalar,
            takes_workspace=takes_workspace,
            has_own_order=has_own_order,
            is_special=is_special,
            is_plain=not (is_special or is_composite or takes_workspace or has_flops),
        )
        return op
