"""The functions of the package flash_attn (FlashAttention-2): they allocate what the real ones do.

Read in 2.8.3, never run. Source: flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp of
Dao-AILab/flash-attention. 2.7.3 allocates the same, except for heads of 129 to 160 values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from memscope.simulation.devices.catalogue import Device
from memscope.simulation.packages.attention import Lengths, attend, check_inputs
from memscope.simulation.packages.operators import memscope_ops
from memscope.simulation.packages.padding import index_first_axis, pad_input, unpad_input
from memscope.simulation.packages.rotary import apply_rotary_emb
from memscope.simulation.packages.signatures import with_parameters
from memscope.simulation.refusal import NotSimulated

__all__ = ["VERSION", "flash_attn_2"]

VERSION = "2.8.3"

_PACKED_BY_LENGTH = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_FUNCTIONS = {
    "flash_attn_func": (("q", "k", "v"), ()),
    "flash_attn_kvpacked_func": (("q", "kv"), ()),
    "flash_attn_qkvpacked_func": (("qkv",), ()),
    "flash_attn_varlen_func": (("q", "k", "v"), _PACKED_BY_LENGTH),
    "flash_attn_varlen_kvpacked_func": (("q", "kv"), _PACKED_BY_LENGTH),
    "flash_attn_varlen_qkvpacked_func": (("qkv",), ("cu_seqlens", "max_seqlen")),
}
"""Function → its tensors, and the lengths it takes."""
_OPTIONS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip


def flash_attn_2(device: Device, use: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """The package's modules, by name, and what is in each.

    Args:
        device: the simulated GPU.
        use: called whenever a function is.
    """

    def run(tensors: tuple[str, ...], given: Mapping[str, Any]) -> Any:
        use()
        packed = [given[name] for name in tensors]
        _check(device, packed, given)
        return attend(_KERNELS, given, packed)

    functions = {
        name: with_parameters(
            name,
            tensors + lengths,
            {**_OPTIONS, "block_table": None} if name == "flash_attn_varlen_func" else _OPTIONS,
            partial(run, tensors),
        )
        for name, (tensors, lengths) in _FUNCTIONS.items()
    } | {"flash_attn_with_kvcache": _inference}
    padding = {"index_first_axis": index_first_axis, "pad_input": pad_input, "unpad_input": unpad_input}
    rotary = {"apply_rotary_emb": apply_rotary_emb, "apply_rotary_emb_func": apply_rotary_emb}
    return {
        "flash_attn": {"__version__": VERSION, **functions},
        "flash_attn.flash_attn_interface": functions,
        "flash_attn.bert_padding": padding,
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": rotary,
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


def _inference(*args: Any, **kwargs: Any) -> Any:
    raise NotSimulated("flash_attn_with_kvcache is for inference, and not simulated")


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
