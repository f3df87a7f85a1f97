"""flash_attn.layers.rotary: the rotary embedding as one kernel, which keeps its tables only.

The time of the kernel is not estimated. Source: flash_attn/layers/rotary.py and flash_attn/ops/triton/rotary.py of
flash-attention 2.8.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RotaryEmbedding", "apply_rotary_emb", "apply_rotary_emb_kv_", "apply_rotary_emb_qkv_"]


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


class _RotaryInPlace(torch.autograd.Function):
    """Rotates parts of a stacked tensor, and of its gradient, in place."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, *tables: Any) -> Tensor:
        kept = [value for value in tables if isinstance(value, Tensor)]
        ctx.save_for_backward(*kept)
        ctx.tables = len(tables)
        _read(kept)
        return stacked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _read(ctx.saved_tensors)
        return grads[0], *[None] * ctx.tables


def _read(tables: Sequence[Tensor]) -> None:
    """Take the memory of dense copies, while the kernel runs."""
    _ = [table.contiguous() for table in tables]


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


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Query, key and value stacked before the heads, or in the heads: queries and keys rotated in place."""
    return _RotaryInPlace.apply(qkv, cos, sin, cos_k, sin_k, seqlen_offsets)  # type: ignore[no-any-return, no-untyped-call]


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Keys and values `[batch, seq, 2, heads, head size]`: keys rotated in place."""
    return _RotaryInPlace.apply(kv, cos, sin, seqlen_offsets)  # type: ignore[no-any-return, no-untyped-call]


class RotaryEmbedding(nn.Module):
    """The embedding as a module: it keeps its tables for the longest sequence so far, in the dtype of its input."""

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device, dtype=torch.float32) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._length = 0
        self._tables: list[Tensor] = []
        """Cosine and sine of the queries; with `scale_base`, those of the keys too."""

    def _frequencies(self, device: Any) -> Tensor:
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _fill(self, length: int, like: Tensor) -> None:
        """Make tables for sequences of this length, if there are none."""
        if length <= self._length and self._tables[0].dtype == like.dtype and self._tables[0].device == like.device:
            return
        self._length = length
        positions = torch.arange(length, device=like.device, dtype=torch.float32)
        frequencies = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._frequencies(like.device)
        angles = torch.outer(positions, frequencies)
        if self.scale is None or self.scale_base is None:
            self._tables = [torch.cos(angles).to(like.dtype), torch.sin(angles).to(like.dtype)]
            return
        power = (torch.arange(length, device=self.scale.device, dtype=self.scale.dtype) - length // 2) / self.scale_base
        scale = self.scale ** power.unsqueeze(1)
        self._tables = [
            (torch.cos(angles) * scale).to(like.dtype),
            (torch.sin(angles) * scale).to(like.dtype),
            (torch.cos(angles) / scale).to(like.dtype),
            (torch.sin(angles) / scale).to(like.dtype),
        ]

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Any:
        """`qkv`, or `qkv` and `kv`, rotated in place."""
        if max_seqlen is not None:
            self._fill(max_seqlen, qkv)
        elif isinstance(seqlen_offset, int):
            self._fill(qkv.shape[1] + seqlen_offset, qkv)
        (cos, sin), (cos_k, sin_k) = self._tables[:2], self._tables[-2:]
        if kv is not None:
            rotated = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
            return rotated, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
        return apply_rotary_emb_qkv_(
            qkv,
            cos,
            sin,
            cos_k if self.scale is not None else None,
            sin_k if self.scale is not None else None,
            self.interleaved,
            seqlen_offset,
            num_heads_q,
        )
