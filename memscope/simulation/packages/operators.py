"""Operators for the kernels of FlashAttention-2 and 3 and of bitsandbytes, which allocate as these do.

They compute nothing. Their arguments have the names that the libraries give them. Temporaries of FlashAttention are in
`memscope/simulation/cuda/workspace_flash_attn.py`; its queries, keys and values are `[batch, seq, heads, head size]`
or, for samples packed by length, `[tokens, heads, head size]`.
"""

from __future__ import annotations

from collections.abc import Callable
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
    "gemm_4bit": "(Tensor A, Tensor B, int[] shapeB) -> Tensor",
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


def _gemm_4bit(values: Tensor, weight: Tensor, shape: list[int]) -> Tensor:
    """The product of `[..., in]` with a packed weight of the shape `[out, in]`, which is not unpacked in memory.

    Source: `_gemm_4bit_kernel_impl` in backends/cuda/ops.py of bitsandbytes 0.50.2.
    """
    return values.new_empty((*values.shape[:-1], shape[0]))


def _gemm_4bit_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Those of the product `[..., in]` · `[in, out]`."""
    values, shape = args[0], args[2]
    return 2 * int(values.numel()) * int(shape[0])


def _flops(q: Tensor, max_seqlen_k: int) -> int:
    """Floating-point operations of one product of queries and keys, without regard to the mask, as PyTorch counts."""
    return 2 * q.numel() * max_seqlen_k


def _forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Two products: the scores, and the weighted sum of the values."""
    return 2 * _flops(args[0], args[6])


def _backward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    return 5 * _flops(args[1], args[12])


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., int]]] = {
    "flash_attn_2_forward": (_forward_2, _forward_flops),
    "flash_attn_2_backward": (_backward, _backward_flops),
    "flash_attn_3_forward": (_forward_3, _forward_flops),
    "flash_attn_3_backward": (_backward, _backward_flops),
    "gemm_4bit": (_gemm_4bit, _gemm_4bit_flops),
}
"""Operator → its results, and its floating-point operations."""


def _defined() -> Any:
    """Define the operators, once in a process."""
    library = torch.library.Library("memscope", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        result, count = _KERNELS[name]
        library.define(name + schema)
        library._register_fake(name, result)
        register_flop_formula(getattr(torch.ops.memscope, name), get_raw=True)(count)
    return library


_LIBRARY = _defined()
memscope_ops = torch.ops.memscope
"""The operators by name: `flash_attn_2_forward`, `flash_attn_2_backward`, the same of 3, and `gemm_4bit`."""
