"""The functions of the package flash_attn (FlashAttention-2): they allocate what the real ones do.

Read in 2.8.3, never run. Source: flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp of
Dao-AILab/flash-attention. 2.7.3 allocates the same, except for heads of 129 to 160 values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from memscope.simulation.devices.catalogue import Device
from memscope.simulation.packages.attention import Lengths, Signature, check_inputs, functions
from memscope.simulation.packages.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from memscope.simulation.packages.layer_norm import layer_norms
from memscope.simulation.packages.operators import memscope_ops
from memscope.simulation.packages.padding import index_first_axis, pad_input, unpad_input
from memscope.simulation.packages.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from memscope.simulation.refusal import NotSimulated

__all__ = ["VERSION", "flash_attn_2"]

VERSION = "2.8.3"

_PACKED_BY_LENGTH = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_OPTIONS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
_FUNCTIONS = {
    "flash_attn_func": Signature(("q", "k", "v"), (), _OPTIONS),
    "flash_attn_kvpacked_func": Signature(("q", "kv"), (), _OPTIONS),
    "flash_attn_qkvpacked_func": Signature(("qkv",), (), _OPTIONS),
    "flash_attn_varlen_func": Signature(("q", "k", "v"), _PACKED_BY_LENGTH, {**_OPTIONS, "block_table": None}),
    "flash_attn_varlen_kvpacked_func": Signature(("q", "kv"), _PACKED_BY_LENGTH, _OPTIONS),
    "flash_attn_varlen_qkvpacked_func": Signature(("qkv",), ("cu_seqlens", "max_seqlen"), _OPTIONS),
}


def flash_attn_2(device: Device) -> dict[str, dict[str, Any]]:
    """The package's modules, by name, and what is in each.

    Args:
        device: the simulated GPU.
    """
    attention = functions(_KERNELS, _FUNCTIONS, partial(_check, device))
    padding = {"index_first_axis": index_first_axis, "pad_input": pad_input, "unpad_input": unpad_input}
    rotary = {
        "apply_rotary_emb": apply_rotary_emb,
        "apply_rotary_emb_func": apply_rotary_emb,
        "apply_rotary_emb_qkv_": apply_rotary_emb_qkv_,
        "apply_rotary_emb_kv_": apply_rotary_emb_kv_,
        "RotaryEmbedding": RotaryEmbedding,
    }
    return {
        "flash_attn": {"__version__": VERSION, **attention},
        "flash_attn.flash_attn_interface": attention,
        "flash_attn.bert_padding": padding,
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": rotary,
        "flash_attn.losses": {},
        "flash_attn.losses.cross_entropy": {"CrossEntropyLoss": CrossEntropyLoss},
        "flash_attn.ops": {},
        "flash_attn.ops.triton": {},
        "flash_attn.ops.triton.cross_entropy": {"cross_entropy_loss": cross_entropy_loss},
        "flash_attn.ops.triton.layer_norm": layer_norms(device),
    }


def _check(device: Device, packed: Sequence[Tensor], given: Mapping[str, Any]) -> None:
    if device.capability < (8, 0):
        has = ".".join(map(str, device.capability))
        raise NotSimulated(
            f"flash_attn needs a GPU of compute capability 8.0 or later; {device.name} has {has}. Use another "
            "attention, such as sdpa, or another --device"
        )
    check_inputs("flash_attn", packed)
    if given.get("block_table") is not None:
        raise NotSimulated("flash_attn: a paged cache (block_table) is for inference, and not simulated")
    if given["softcap"] > 0 and given["dropout_p"] > 0:
        raise NotSimulated("flash_attn takes softcap only without dropout. Set the dropout of attention to 0")


class _Kernels:
    def forward(self, tensors: Sequence[Tensor], lengths: Lengths, given: Mapping[str, Any]) -> tuple[Tensor, ...]:
        returns = bool(given["return_attn_probs"]) and given["dropout_p"] > 0
        out, lse, probabilities, rng_state = memscope_ops.flash_attn_2_forward(
            *tensors, *lengths, float(given["dropout_p"]), returns
        )
        return out, lse, rng_state, probabilities

    def backward(self, tensors: Sequence[Tensor], lengths: Lengths, given: Mapping[str, Any]) -> None:
        memscope_ops.flash_attn_2_backward(*tensors, *lengths, bool(given["deterministic"]))


_KERNELS = _Kernels()
