"""How the factors of a low-rank update start, and what that takes before the first step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from memscope.strategies.lora.magnitude import low_rank, stored

__all__ = ["Start", "initialize", "setup_bytes"]

Start = Literal["gaussian", "pissa", "olora"]
"""`gaussian`: A is normal with standard deviation 1/r, and B is zero. `pissa`: the r largest singular values of the
weight (Meng et al., 2024). `olora`: r rows and columns of its QR decomposition (Büyükakyüz, 2024). The latter two are
taken out of the frozen weight. The output is unchanged at first, up to rounding."""


@torch.no_grad()
def initialize(layer: Any, start: Start) -> None:
    """Give `lora_a` and `lora_b` of a `LoRALinear` their first values; `lora_b` is zero before.

    Source: `reset_lora_parameters`, `pissa_init` and `olora_init` in peft/tuners/lora/layer.py, 0.21.
    """
    r = layer.lora_a.shape[0]
    if start == "gaussian":
        nn.init.normal_(layer.lora_a, std=1 / r)
        return
    weight = stored(layer, layer.weight).float()
    layer.lora_b[:], layer.lora_a[:] = (
        _singular(weight, r, layer.scaling) if start == "pissa" else _orthogonal(weight, r)
    )
    layer.weight.sub_(stored(layer, low_rank(layer)))


def _singular(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return u[:, :r] * root, root[:, None] * v[:r]


def _orthogonal(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    q, rest = torch.linalg.qr(weight)
    return q[:, :r], rest[:r]


def setup_bytes(weight: Tensor) -> int:
    """Bytes of the tensors that PEFT holds at once, beside the model, while it decomposes a weight and updates it.

    They are, in float32: the weight unless it is in float32 already, two factors, their product and the new weight.
    The workspace of cuSOLVER is not counted.
    """
    rows, columns = weight.shape
    whole = 2 if weight.dtype is torch.float32 else 3
    return 4 * (whole * rows * columns + (rows + columns) * min(rows, columns))
