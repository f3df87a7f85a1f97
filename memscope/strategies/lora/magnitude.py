"""DoRA: a trained norm of each row of an adapted weight.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memscope.strategies.lora.linear import is_transposed

__all__ = ["low_rank", "stored", "weight_norm", "with_magnitude"]


def low_rank(layer: Any) -> Tensor:
    """The scaled update of a `LoRALinear`, `[out, in]`."""
    update: Tensor = layer.scaling * (layer.lora_b @ layer.lora_a)
    return update


def stored(layer: Any, rows: Tensor) -> Tensor:
    """A matrix `[out, in]`, or `[out, 1]`, in the layout of the layer's weight; and the other way round."""
    return rows.T if is_transposed(layer) else rows


@torch.no_grad()
def weight_norm(layer: Any) -> Tensor:
    """Norm of each row of the updated weight, `[out]`."""
    norm: Tensor = torch.linalg.norm(stored(layer, layer.weight) + low_rank(layer), dim=1).to(layer.weight.dtype)
    return norm


def with_magnitude(layer: Any, x: Tensor, result: Tensor) -> Tensor:
    """What DoRA adds to the result `[..., out]` of the frozen layer for an input `[..., in]`.

    It takes PEFT's temporaries, in its order: the update as a matrix, from an identity matrix of `in` rows; its sum
    with the weight, for the norm, which is treated as a constant (section 4.3 of the paper); and with dropout, the
    product with the frozen weight once more, of the input after dropout.

    Source: `DoraLinearLayer.forward` in peft/tuners/lora/dora.py and `DoraLinearVariant.forward` in variants.py, 0.21.
    """
    a, b, scaling = layer.lora_a, layer.lora_b, layer.scaling
    drops = layer.training and layer.dropout.p > 0
    if drops:
        x = layer.dropout(x)
    identity = torch.eye(a.shape[1], device=a.device, dtype=a.dtype)
    update = F.linear(F.linear(identity, a), b).T.to(x.dtype)
    weight = stored(layer, layer.weight).to(x.dtype)
    norm = torch.linalg.norm(weight + scaling * update.detach(), dim=1).to(weight.dtype).detach()
    scale = (layer.magnitude / norm).view(1, -1)
    low = F.linear(F.linear(x, a), b)
    if drops:
        base = F.linear(x, weight)
    elif layer.bias is None:
        base = result
    else:
        base = result - layer.bias
    added: Tensor = (scale - 1) * base + scale * low * scaling
    return added
