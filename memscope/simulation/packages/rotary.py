"""flash_attn.layers.rotary: the rotary embedding as one kernel, which keeps its tables only.

The time of the kernel is not estimated. Source: flash_attn/layers/rotary.py and flash_attn/ops/triton/rotary.py of
flash-attention 2.8.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["apply_rotary_emb"]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inplace: bool, *lengths: Any) -> Tensor:
        ctx.save_for_backward(cos, sin, *(value for value in lengths if isinstance(value, Tensor)))
        ctx.inplace = inplace
        return _rotated(x, cos, sin, inplace)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin, *_ = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, ctx.inplace), None, None, None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> Tensor:
    """The memory of the result; what lies beyond the rotated values is copied."""
    cos, sin = cos.contiguous(), sin.contiguous()
    if inplace:
        return x
    out, rotated = torch.empty_like(x), 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        out[..., rotated:].copy_(x[..., rotated:])
    return out


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The rotated `x`, `[batch, seq, heads, head size]` or `[tokens, heads, head size]`."""
    return _Rotary.apply(x, cos, sin, inplace, seqlen_offsets, cu_seqlens)  # type: ignore[no-any-return, no-untyped-call]
