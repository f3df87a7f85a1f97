"""flash_attn.bert_padding: samples of different length without their padding, and back.

The mask decides how many tokens stay, so its values must be known or assumed. Source: flash_attn/bert_padding.py of
flash-attention 2.8.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


class _Gathered(torch.autograd.Function):
    """Rows of a tensor, by gather; their gradient is scattered into zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = tensor.shape[0]
        flat = tensor.reshape(ctx.rows, -1)
        return torch.gather(flat, 0, _expanded(indices, flat)).reshape(-1, *tensor.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (indices,), (grad,) = ctx.saved_tensors, grads
        flat = grad.reshape(grad.shape[0], -1)
        result = flat.new_zeros((ctx.rows, flat.shape[1]))
        result.scatter_(0, _expanded(indices, flat), flat)
        return result.reshape(ctx.rows, *grad.shape[1:]), None


class _Placed(torch.autograd.Function):
    """Zeros with rows of a tensor in some places."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, indices: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(indices)
        result = tensor.new_zeros((rows, *tensor.shape[1:]))
        result[indices] = tensor
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return grads[0][indices], None, None


def _expanded(indices: Tensor, rows: Tensor) -> Tensor:
    return indices.unsqueeze(1).expand(-1, rows.shape[1])


def index_first_axis(tensor: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` of a tensor `[rows, …]`."""
    return _Gathered.apply(tensor, indices)  # type: ignore[no-any-return, no-untyped-call]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask `[batch, seq]` selects from `[batch, seq, …]`.

    Returns:
        The tokens `[tokens, …]`; their indices; where each sample begins, `[batch + 1]`; the longest sample; and the
        number of tokens of each sample.
    """
    selected = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = selected.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(selected.flatten(), as_tuple=False).flatten()
    longest = int(lengths.max().item())
    begins = F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, begins, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Tokens `[tokens, …]` in their places of `[batch, seqlen, …]`."""
    placed: Tensor = _Placed.apply(hidden_states, indices, batch * seqlen)  # type: ignore[no-untyped-call]
    return placed.reshape(batch, seqlen, *placed.shape[1:])
