"""The functions of flash_attn_interface (FlashAttention-3, for Hopper): they allocate what the real ones do.

Read in 3.0.0b1, never run. Source: hopper/flash_attn_interface.py and hopper/flash_api.cpp of
Dao-AILab/flash-attention 2.8.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from memscope.simulation.devices.catalogue import Device
from memscope.simulation.packages.attention import Lengths, Signature, check_inputs, functions
from memscope.simulation.packages.operators import memscope_ops
from memscope.simulation.refusal import NotSimulated

__all__ = ["VERSION", "flash_attn_3"]

VERSION = "3.0.0b1"

_DESCALE = {"q_descale": None, "k_descale": None, "v_descale": None}
_SHARED = {"window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0}
_OPTIONS = {
    "softmax_scale": None, "causal": False, "qv": None, **_DESCALE, **_SHARED, "num_splits": 1, "pack_gqa": None,
    "deterministic": False, "sm_margin": 0,
}  # fmt: skip
_FUNCTIONS = {
    "flash_attn_func": Signature(("q", "k", "v"), (), _OPTIONS),
    "flash_attn_varlen_func": Signature(
        ("q", "k", "v"),
        ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        {"seqused_q": None, "seqused_k": None, **_OPTIONS},
    ),
    "flash_attn_qkvpacked_func": Signature(
        ("qkv",),
        (),
        {
            "softmax_scale": None, "causal": False, **_DESCALE, **_SHARED, "deterministic": False, "num_heads_q": None,
            "sm_margin": 0,
        },
    ),
}  # fmt: skip
_REFUSED = {"qv": None, **_DESCALE, "attention_chunk": 0, "num_splits": 1, "num_heads_q": None}
"""Options that only have their default value here: for inference, 8-bit floats, or a layout that no library uses."""


def flash_attn_3(device: Device) -> dict[str, dict[str, Any]]:
    """The package's modules, by name, and what is in each.

    Args:
        device: the simulated GPU.
    """
    return {"flash_attn_interface": functions(_KERNELS, _FUNCTIONS, partial(_check, device))}


def _check(device: Device, packed: Sequence[Tensor], given: Mapping[str, Any]) -> None:
    if device.capability[0] != 9:
        has = ".".join(map(str, device.capability))
        raise NotSimulated(
            f"FlashAttention-3 needs a Hopper GPU, compute capability 9.0; {device.name} has {has}. Use "
            "flash_attention_2, or another --device"
        )
    check_inputs("FlashAttention-3", packed)
    if packed[0].shape[-1] % 8:
        raise NotSimulated(
            f"FlashAttention-3 takes heads of a multiple of 8 values, and got {packed[0].shape[-1]}. Use "
            "flash_attention_2"
        )
    for name, default in _REFUSED.items():
        if given.get(name, default) != default:
            raise NotSimulated(f"FlashAttention-3: {name}={given[name]!r} is not simulated; its default is {default}")


def _mask(lengths: Lengths, given: Mapping[str, Any]) -> tuple[bool, int, int]:
    """Whether the mask is causal, and the window to the left and right of it, as mha_fwd and mha_bwd see them."""
    left, right = given["window_size"]
    left = -1 if left >= lengths.max_seqlen_k - 1 else left
    right = 0 if given["causal"] else -1 if right >= lengths.max_seqlen_q - 1 else right
    return left < 0 and right == 0, left, right


class _Kernels:
    def forward(self, tensors: Sequence[Tensor], lengths: Lengths, given: Mapping[str, Any]) -> tuple[Tensor, ...]:
        out, lse = memscope_ops.flash_attn_3_forward(*tensors, *lengths, *_mask(lengths, given))
        return out, lse, lse

    def backward(self, tensors: Sequence[Tensor], lengths: Lengths, given: Mapping[str, Any]) -> None:
        memscope_ops.flash_attn_3_backward(
            *tensors, *lengths, *_mask(lengths, given), float(given["softcap"]), bool(given["deterministic"])
        )


_KERNELS = _Kernels()
