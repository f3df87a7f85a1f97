"""Optimizer state that is paged: bitsandbytes keeps it in managed memory of CUDA, outside PyTorch's allocator."""

from __future__ import annotations

from torch import Tensor

from memscope.units import format_bytes

__all__ = ["is_paged", "paged_note"]


def is_paged(tensor: Tensor) -> bool:
    """Whether a tensor is paged: on the host, from where the driver moves pages to the GPU when a kernel needs them.

    Source: `get_paged` in bitsandbytes/functional.py (0.50.2), which marks its tensors so.
    """
    return getattr(tensor, "is_paged", False) is True


def paged_note(size_bytes: int) -> str:
    """What to know about a trace whose optimizer has paged state of this size."""
    return (
        f"{format_bytes(size_bytes)} of optimizer state are paged: they are in CUDA's managed memory, outside "
        "PyTorch's allocator, and in no figure of GPU memory here. They need as much host memory; the driver moves "
        "pages to the GPU during the optimizer's step, as far as there is room"
    )
