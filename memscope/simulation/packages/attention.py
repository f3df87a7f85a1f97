"""FlashAttention as autograd sees it: which tensors one call keeps for its backward pass, and which that makes.

Sources: flash_attn/flash_attn_interface.py and hopper/flash_attn_interface.py of flash-attention 2.8.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from memscope.simulation.packages.signatures import with_parameters
from memscope.simulation.refusal import NotSimulated

__all__ = ["AttentionKernels", "Lengths", "Signature", "check_inputs", "functions"]


class Signature(NamedTuple):
    """The parameters of a function: its tensors, the lengths it takes, and its options with their defaults."""

    tensors: tuple[str, ...]
    lengths: tuple[str, ...]
    options: Mapping[str, Any]


class Lengths(NamedTuple):
    """Lengths of the samples, as the operators take them."""

    cu_seqlens_q: Tensor | None
    """`[batch + 1]`: where each of the packed samples begins; None: all samples have the same length."""
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, given: Mapping[str, Any], query: Tensor, key: Tensor) -> Lengths:
        """The lengths that a call gives, or those of samples `[batch, seq, heads, head size]`."""
        if "cu_seqlens" in given:
            longest = int(given["max_seqlen"])
            return cls(given["cu_seqlens"], given["cu_seqlens"], longest, longest)
        if "cu_seqlens_q" in given:
            longest = int(given["max_seqlen_q"])
            same = given["max_seqlen_k"] is given["max_seqlen_q"]
            return cls(
                given["cu_seqlens_q"],
                given["cu_seqlens_k"],
                longest,
                longest if same else int(given["max_seqlen_k"]),
            )
        return cls(None, None, query.shape[1], key.shape[1])


class AttentionKernels(Protocol):
    """The kernels of one release. `given` has the arguments of a call by the names that FlashAttention gives them."""

    def forward(self, tensors: Sequence[Tensor], lengths: Lengths, given: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The output; what else the backward pass needs; last, the probabilities that were asked for."""

    def backward(self, tensors: Sequence[Tensor], lengths: Lengths, given: Mapping[str, Any]) -> None:
        """Write gradients. `tensors`: gradient of the output, query, key, value, output, log-sum-exp, gradients."""


def check_inputs(name: str, tensors: Sequence[Tensor]) -> None:
    """Refuse what every kernel of FlashAttention refuses.

    Raises:
        NotSimulated: the dtype, the head size, or the numbers of heads.
    """
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors})
    if dtypes not in (["float16"], ["bfloat16"]):
        raise NotSimulated(
            f"{name} takes float16 or bfloat16, and got {' and '.join(dtypes)}. Use weights of 16 bits or autocast "
            "(for hf: targets --set dtype=bf16, or autocast=bf16), or another attention, such as sdpa"
        )
    size, heads, key_heads = tensors[0].shape[-1], tensors[0].shape[-2], tensors[-1].shape[-2]
    if size > 256:
        raise NotSimulated(f"{name} takes heads of at most 256 values, and got {size}. Use another attention")
    if heads % key_heads:
        raise NotSimulated(f"{name}: the {heads} heads of the query are not a multiple of the {key_heads} of the key")


def functions(
    kernels: AttentionKernels,
    signatures: Mapping[str, Signature],
    check: Callable[[Sequence[Tensor], Mapping[str, Any]], None],
) -> dict[str, Callable[..., Any]]:
    """The functions of a release by name; that for inference refuses every call.

    Args:
        kernels: those of the release.
        signatures: name of a function → its parameters.
        check: is given tensors and arguments, and refuses what the release refuses.
    """

    def run(tensors: tuple[str, ...], given: Mapping[str, Any]) -> Any:
        packed = [given[name] for name in tensors]
        check(packed, given)
        return _attend(kernels, given, packed)

    return {
        name: with_parameters(name, one.tensors + one.lengths, one.options, partial(run, one.tensors))
        for name, one in signatures.items()
    } | {"flash_attn_with_kvcache": _inference}


def _inference(*args: Any, **kwargs: Any) -> Any:
    raise NotSimulated("flash_attn_with_kvcache is for inference, and not simulated")


def _attend(kernels: AttentionKernels, given: Mapping[str, Any], packed: Sequence[Tensor]) -> Any:
    """The output `[…, heads, head size]`; with log-sum-exp and probabilities if `return_attn_probs` is true.

    Args:
        kernels: those of one release.
        given: the arguments of the call.
        packed: query, key and value; the query, and keys and values stacked before the heads; or all three stacked.
    """
    lengths = Lengths.of(given, packed[0], packed[-1])
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in packed)
    return _Attention.apply(kernels, lengths, given, saves, *packed)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: AttentionKernels, lengths: Lengths, given: Mapping[str, Any], saves: bool, *packed: Tensor
    ) -> Any:
        tensors = [_dense(_padded(t)) for t in _unpacked(packed)]
        out, *saved, probabilities = kernels.forward(tensors, lengths, given)
        ctx.kernels, ctx.given, ctx.size, ctx.parts = kernels, given, packed[0].shape[-1], len(packed)
        ctx.longest = lengths[2:]
        if saves:
            ctx.save_for_backward(*tensors, out, *lengths[:2], *saved)
        trimmed = out[..., : ctx.size]
        return (trimmed, saved[0], probabilities) if given.get("return_attn_probs") else trimmed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, out, *cu_seqlens, lse = ctx.saved_tensors[:7]
        made = _gradients(query, key, value, ctx.parts)
        tensors = [_dense(_padded(grads[0])), query, key, value, out, lse, *_unpacked(made)]
        ctx.kernels.backward(tensors, Lengths(*cu_seqlens, *ctx.longest), ctx.given)
        return None, None, None, None, *(t[..., : ctx.size] for t in made)


def _gradients(query: Tensor, key: Tensor, value: Tensor, parts: int) -> list[Tensor]:
    """Memory for the gradients of `parts` tensors; the last of them stacks what is not passed alone."""
    if parts == 3:
        return [torch.empty_like(t) for t in (query, key, value)]
    stacked = key.new_empty((*key.shape[:-2], 4 - parts, *key.shape[-2:]))
    return [torch.empty_like(query), stacked] if parts == 2 else [stacked]


def _unpacked(packed: Sequence[Tensor]) -> list[Tensor]:
    """Query, key and value."""
    return list(packed) if len(packed) == 3 else [*packed[:-1], *packed[-1].unbind(-3)]


def _padded(tensor: Tensor) -> Tensor:
    """The tensor with heads padded to a multiple of 8 values."""
    missing = -tensor.shape[-1] % 8
    return F.pad(tensor, [0, missing]) if missing else tensor


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
