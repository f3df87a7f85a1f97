"""The cross-entropy of a linear head's logits, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies.ckpt.recompute import run_checkpointed

__all__ = ["Labelled", "SummedLoss", "chunked", "fused", "has_fused"]


@dataclass(frozen=True)
class Labelled:
    """The input of a head, and the labels of its tokens."""

    inputs: Tensor
    """`[..., dim]`."""
    labels: Tensor
    """`[...]`, of type int64."""
    ignored: int
    """Label of a token without a loss."""
    upcast: bool
    """Whether the logits are converted to float32 before the loss."""

    @property
    def count(self) -> Tensor:
        """Number of tokens with a label."""
        return (self.labels != self.ignored).sum()


SummedLoss = Callable[[nn.Module, Labelled, int], Tensor]
"""`(head, tokens, chunks)` → the sum of the losses of all tokens, a scalar."""


def chunked(head: nn.Module, tokens: Labelled, chunks: int) -> Tensor:
    """The logits and the loss of one part of the tokens after the other, each under a checkpoint.

    The logits of a part die with its loss; the backward pass computes them again. The head is called as a module, so
    an adapted head works too.
    """

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = head(inputs)
        if tokens.upcast and logits.dtype != torch.float64:
            logits = logits.float()
        return F.cross_entropy(logits, labels, ignore_index=tokens.ignored, reduction="sum")

    parts = zip(_rows(tokens).chunk(chunks), tokens.labels.flatten().chunk(chunks), strict=True)
    total: Tensor = sum(run_checkpointed(loss, (part, {})) for part in parts)
    return total


def fused(head: nn.Module, tokens: Labelled, chunks: int) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy`: the gradients too are computed in the forward pass, part by part.

    The parts and the precision are the same on every device: no scratch copy of the weight's gradient ("compact"), and
    sums in float32 for inputs of 16 bits. Source: torch/nn/modules/linear_cross_entropy.py of PyTorch 2.13.

    Raises:
        UsageError: the head is not a plain linear layer.
    """
    weight: Any = head._parameters.get("weight")
    if weight is None or "lora_a" in head._parameters or not isinstance(head, nn.Linear):
        raise UsageError(
            f"loss: fused multiplies by the weight of the head, and this {type(head).__name__} computes its result "
            "otherwise: use loss:chunked"
        )
    rows, bias = _rows(tokens), head.bias
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    low = dtype in (torch.float16, torch.bfloat16)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=-(-len(rows) // chunks),
        chunking_method=None,
        acc_policy="compact",
        acc_dtype=torch.float32 if low else dtype,
    )
    total: Tensor = F.linear_cross_entropy(
        rows.to(dtype),
        weight.to(dtype),
        tokens.labels.flatten(),
        linear_bias=None if bias is None else bias.to(dtype),
        reduction="sum",
        ignore_index=tokens.ignored,
        options=options,
    )
    return total.float() if low else total


def has_fused() -> bool:
    """Whether the installed PyTorch has `linear_cross_entropy` in parts; 2.13 does."""
    return hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")


def _rows(tokens: Labelled) -> Tensor:
    """The input of the head as `[tokens, dim]`."""
    return tokens.inputs.flatten(0, -2)
