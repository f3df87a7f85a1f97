"""Paged optimizer state on a simulated GPU: tensors on the host, in place of CUDA's managed memory.

Source: `get_paged`, `fill` and `prefetch_tensor` in bitsandbytes/functional.py (0.50.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memscope.simulation.host import HostOperators
from memscope.simulation.machine.libraries import Changes

__all__ = ["HostTensors", "paged_state"]

_MakeOnHost = Callable[[tuple[int, ...], torch.dtype], Tensor]


def paged_state(make_on_host: _MakeOnHost) -> Changes:
    """The changes with which bitsandbytes, and what stands in for it, make paged state on the host."""

    def get_paged(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
            made: Any = make_on_host(shape, dtype)
            made.is_paged = True
            return made  # type: ignore[no-any-return]

        return make

    def nothing(original: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    return {
        "bitsandbytes.functional": {"get_paged": get_paged, "fill": nothing, "prefetch_tensor": nothing},
        "memscope.strategies.optim.blockwise": {"BlockwiseOptimizer.get_paged": get_paged},
    }


class HostTensors:
    """Makes tensors on the host, which are no memory of the device.

    Attributes:
        host: the host beside the device; None before the step is recorded.
    """

    def __init__(self) -> None:
        self.host: HostOperators | None = None

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the host."""
        with self.host.moving(to_host=True, crossing=False, followed=True) if self.host else contextlib.nullcontext():
            return torch.zeros(shape, dtype=dtype)
