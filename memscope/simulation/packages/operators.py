"""Operators for the kernels of FlashAttention-2 and 3, which allocate as these do and compute nothing.

Their arguments have the names that FlashAttention gives them; their temporaries are in
`memscope/simulation/cuda/workspace_flash_attn.py`. Queries, keys and values are
`[batch, seq, heads, head size]` or, for samples packed by length, `[tokens, heads, head size]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["memscope_ops"]

_INPUTS = "Tensor q, Tensor k, Tensor v"
_LENGTHS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k"
_RESULTS = "Tensor out, Tensor softmax_lse, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv"
_WINDOW = "bool causal, int window_left, int window_right"
_SCHEMAS = {
    "flash_attn_2_forward": f"({_INPUTS}, {_LENGTHS}, float dropout_p, bool return_softmax)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "flash_attn_2_backward": f"(Tensor dout, {_INPUTS}, {_RESULTS}, {_LENGTHS}, bool deterministic) -> ()",
    "flash_attn_3_forward": f"({_INPUTS}, {_LENGTHS}, {_WINDOW}) -> (Tensor, Tensor)",
    "flash_attn_3_backward": f"(Tensor dout, {_INPUTS}, {_RESULTS}, {_LENGTHS}, {_WINDOW}, float softcap, "
    "bool deterministic) -> ()",
}


def _lse(q: Tensor) -> Tensor:
    """The log-sum-exp of each row in float32: `[batch, heads, seq]`, or `[heads, tokens]` of packed samples."""
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)


def _forward_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of mha_fwd and mha_varlen_fwd: output, log-sum-exp, probabilities if asked for, state of the generator.

    Source: csrc/flash_attn/flash_api.cpp of flash-attention 2.8.3.
    """
    out, lse = torch.empty_like(q), _lse(q)
    shape: tuple[int, ...] = (0,)
    if return_softmax:
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        shape = (batch, q.shape[-2], -(-max_seqlen_q // 128) * 128, -(-max_seqlen_k // 128) * 128)
    return out, lse, q.new_empty(shape), q.new_empty(2, dtype=torch.int64)


def _forward_3(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Results of mha_fwd in hopper/flash_api.cpp of flash-attention 2.8.3: output and log-sum-exp."""
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _lse(q)


def _backward(*args: Any) -> None:
    """Nothing: the gradients are among the arguments."""


def _flops(q: Tensor, max_seqlen_k: int) -> int:
    """Floating-point operations of one product of queries and keys, without regard to the mask, as PyTorch counts."""
    return 2 * q.numel() * max_seqlen_k


def _forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Two products: the scores, and the weighted sum of the values."""
    return 2 * _flops(args[0], args[6])


def _backward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    return 5 * _flops(args[1], args[12])


def _defined() -> Any:
    """Define the operators, once in a process."""
    library = torch.library.Library("memscope", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        forward = {"flash_attn_2_forward": _forward_2, "flash_attn_3_forward": _forward_3}.get(name)
        library._register_fake(name, forward or _backward)
        count = _forward_flops if forward else _backward_flops
        register_flop_formula(getattr(torch.ops.memscope, name), get_raw=True)(count)
    return library


_LIBRARY = _defined()
memscope_ops = torch.ops.memscope
"""The operators by name: `flash_attn_2_forward`, `flash_attn_2_backward`, and the same of 3."""
