"""Choice of the scaled dot-product attention kernel on CUDA, and preparation of its arguments.

The kernels' own operators can be traced on fake CPU tensors. This module chooses the kernel and prepares the arguments
as `sdp_utils.cpp` in aten/src/ATen/native/transformers/cuda and `attention.cpp` one folder above do. Both were read in
revisions around 2.9.0, 2.10 and 2.11.0, and in one after 2.15; `sdp_utils_cpp.h` in 2.11.0, 2.13.0 and 2.15.0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memscope.simulation.cuda.packaged import cudnn_version, torch_version

__all__ = ["AttentionCall", "Platform", "scaled_dot_product_attention"]

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_MATH, _FLASH, _EFFICIENT, _CUDNN = 0, 1, 2, 3
"""Numbers of the kernels in `SDPBackend` (ATen/SDPBackend.h)."""
_USUAL_ORDER = [_FLASH, _EFFICIENT, _MATH, _CUDNN]


class Platform(NamedTuple):
    """GPU and library versions on which the choice of the kernel depends."""

    capability: tuple[int, int]
    """Compute capability of the GPU (major, minor)."""
    torch: tuple[int, int]
    """Version of PyTorch (major, minor)."""
    cudnn: int
    """Version of cuDNN in the encoding of `torch.backends.cudnn.version()`: 92000 is 9.20.0."""

    @classmethod
    def at_hand(cls, capability: tuple[int, int]) -> Platform:
        """Return the platform of the installed PyTorch, with its own cuDNN, or its CUDA packages' if it has none."""
        return cls(capability, torch_version(), cudnn_version())


class AttentionCall(NamedTuple):
    """The arguments of `torch.nn.functional.scaled_dot_product_attention`."""

    query: Tensor
    """`[batch, heads, sequence, head]`, like key and value."""
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    gqa: bool = False
    """Whether several query heads may share one head of key and value."""

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass may follow."""
        return any(t.requires_grad for t in (self.query, self.key, self.value))

    def is_dense(self, *, mask_too: bool = True) -> bool:
        """Whether the tensors are non-empty, have four dimensions, and hold each row contiguously."""
        tensors = [self.query, self.key, self.value]
        rows = [*tensors, self.mask] if mask_too and self.mask is not None else tensors
        return all(t.ndim == 4 and t.numel() for t in tensors) and all(t.stride(-1) == 1 for t in rows)

    def heads_fit(self, *, grouped: bool) -> bool:
        """Whether batch sizes are equal, and head counts are equal or, if `grouped`, divide the query's evenly."""
        batches, heads = ({t.shape[dim] for t in (self.query, self.key, self.value)} for dim in (0, 1))
        divides = grouped and self.gqa and all(self.query.shape[1] % count == 0 for count in heads)
        return len(batches) == 1 and (len(heads) == 1 or divides)


def scaled_dot_product_attention(platform: Platform, call: AttentionCall) -> Tensor:
    """Return `[batch, heads, sequence, head of value]`, the result of the first kernel that accepts the arguments."""
    for kernel in _order(platform):
        if kernel == _CUDNN and _cudnn_accepts(platform, call):
            return _cudnn(call)
        if kernel == _FLASH and _flash_accepts(platform, call):
            return _flash(call)
        if kernel == _EFFICIENT and _efficient_accepts(platform, call):
            return _efficient(call)
        if kernel == _MATH and torch.backends.cuda.math_sdp_enabled():
            return _math(call)
    raise RuntimeError("No available kernel. Aborting execution.")


def _order(platform: Platform) -> list[int]:
    """Order in which kernels are tried: on data-center GPUs since Hopper, recent cuDNN first, unless the user set one.

    Source: `check_prefer_cudnn_attention` and `priority_order` in sdp_utils.cpp. 2.9.0 requires cuDNN 9.9; 2.10 and
    2.11.0 require more than 9.15.0, which PyTorch's packages on PyPI have from 2.11 on.
    """
    order: list[int] = list(torch._C._get_sdp_priority_order())[: len(_USUAL_ORDER)]
    needed = 9_09_00 if platform.torch < (2, 10) else 9_15_01
    prefers = (
        platform.torch >= (2, 9)
        and platform.cudnn >= needed
        and platform.capability in ((9, 0), (10, 0), *(((10, 3),) if platform.torch >= (2, 11) else ()))
    )
    return [_CUDNN, _FLASH, _EFFICIENT, _MATH] if prefers and order == _USUAL_ORDER else order


def _same_dtype(call: AttentionCall, allowed: tuple[torch.dtype, ...]) -> bool:
    return call.query.dtype == call.key.dtype == call.value.dtype and call.query.dtype in allowed


def _cudnn_accepts(platform: Platform, call: AttentionCall) -> bool:
    queries, keys = call.query.shape[-2], call.key.shape[-2]
    repeatable = torch.get_deterministic_debug_mode() == 2  # 1 is a warning only
    coarse = platform.torch >= (2, 12) and call.dropout_p * 16 % 1 != 0  # pytorch/pytorch pull request 174245
    broken = 9_11_00 < platform.cudnn < 9_14_00
    return (
        torch.backends.cuda.cudnn_sdp_enabled()
        and platform.capability >= (8, 0)
        and not repeatable
        and _same_dtype(call, _HALF)
        and call.is_dense()
        and call.heads_fit(grouped=True)
        and _cudnn_takes_mask(call)
        and _cudnn_takes_heads(platform, call)
        and keys != 1
        and not (call.dropout_p > 0 and (coarse or broken or queries == 1))
    )


def _cudnn_takes_mask(call: AttentionCall) -> bool:
    """Whether cuDNN accepts the mask. Source: `check_attn_mask_shape` in sdp_utils_cpp.h."""
    if call.mask is None:
        return True
    full = (*call.query.shape[:3], call.key.shape[2])
    if call.mask.requires_grad or call.mask.ndim not in (2, 4):
        return False
    return all(size in (1, whole) for size, whole in zip(call.mask.shape, full[-call.mask.ndim :], strict=True))


def _cudnn_takes_heads(platform: Platform, call: AttentionCall) -> bool:
    """Whether cuDNN accepts the head sizes.

    Source: `check_cudnn_tensor_shapes`, and from 2.14 on `check_cudnn_d256_bprop_head_dim`, in sdp_utils.cpp. The limit
    of 2.12 and 2.13 for heads larger than 128 was not read; it is assumed to be that of 2.11.
    """
    sizes = call.query.shape[-1], call.value.shape[-1]
    if any(size % 8 for size in sizes):
        return False
    if max(sizes) <= 128:
        return True
    major = platform.capability[0]
    if platform.torch >= (2, 14):
        wide = platform.capability == (9, 0) or major == 10
        if wide and platform.cudnn > 9_22_00:
            return max(sizes) <= 256 and (not call.needs_gradient or sizes in ((192, 128), (256, 256)))
        return wide and sizes == (192, 128)
    if platform.capability == (9, 0) and platform.cudnn >= 9_10_00:
        return max(sizes) <= 256
    return major == 10 and platform.cudnn >= 9_11_00 and sizes == (192, 128)


def _cudnn(call: AttentionCall) -> Tensor:
    """Run cuDNN's kernel, with a boolean mask made additive.

    Source: `convert_boolean_attn_mask_cudnn` in attention.cpp, whose two scalars stay on the host.
    """
    mask, dtype = call.mask, call.query.dtype
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.where(mask.logical_not(), torch.tensor(-65504.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    keep = torch.is_grad_enabled() and call.needs_gradient
    return aten._scaled_dot_product_cudnn_attention(  # type: ignore[no-any-return]
        call.query, call.key, call.value, mask, keep, call.dropout_p, call.is_causal, False, scale=call.scale
    )[0]


def _flash_accepts(platform: Platform, call: AttentionCall) -> bool:
    head, capability = call.query.shape[-1], platform.capability
    # check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120 in sdp_utils.cpp
    small = (8, 6) <= capability <= (8, 9) or capability in ((12, 0), (12, 1))
    no_backward = 192 < head <= 224 or (head > 224 and call.dropout_p > 0)
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and (8, 0) <= capability <= (12, 1)
        and call.mask is None
        and _same_dtype(call, _HALF)
        and call.is_dense()
        and call.heads_fit(grouped=True)
        and head == call.key.shape[-1] == call.value.shape[-1] <= 256
        and (not call.is_causal or call.query.shape[-2] == call.key.shape[-2])
        and not (small and no_backward and call.needs_gradient)
    )


def _flash(call: AttentionCall) -> Tensor:
    """Run the flash kernel on heads padded to a multiple of 8 (`pad_last_dim<8>` in attention.cpp); trim the result."""
    head = call.query.shape[-1]
    missing = -head % 8
    tensors = (call.query, call.key, call.value)
    query, key, value = (F.pad(t, (0, missing)) for t in tensors) if missing else tensors
    output: Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, call.dropout_p, call.is_causal, False, scale=_scale(call)
    )[0]
    return output[..., :head] if missing else output


def _scale(call: AttentionCall) -> float:
    return call.query.shape[-1] ** -0.5 if call.scale is None else call.scale


def _efficient_accepts(platform: Platform, call: AttentionCall) -> bool:
    query, capability = call.query, platform.capability
    tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and query.dtype in _HALF)
    alignment = max(4 if capability >= (8, 0) else 1, (8 if query.dtype in _HALF else 4) if tensor_cores else 1)
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled()
        and (5, 0) <= capability <= (12, 1)
        and _same_dtype(call, (torch.float32, *(_HALF if capability >= (8, 0) else (torch.float16,))))
        and call.is_dense()
        and call.heads_fit(grouped=platform.torch >= (2, 15))
        and query.shape[-1] == call.key.shape[-1]
        and query.shape[-1] % alignment == 0 == call.value.shape[-1] % alignment
    )


def _efficient(call: AttentionCall) -> Tensor:
    keep = torch.is_grad_enabled() and call.needs_gradient
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        call.query, call.key, call.value, _bias(call), keep, call.dropout_p, call.is_causal, scale=call.scale
    )[0]


def _bias(call: AttentionCall) -> Tensor | None:
    """The mask as an additive one, its last dimension padded to a multiple of 16.

    Source: `convert_boolean_attn_mask` and `preprocess_mask` in attention.cpp.
    """
    if call.mask is None:
        return None
    mask = _additive(call.mask, call.query.dtype)
    length = call.key.shape[-2]
    if length % 16:
        mask = F.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(*call.query.shape[:3], length)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.where(mask.logical_not(), torch.full((), float("-inf"), dtype=dtype), torch.zeros((), dtype=dtype))


def _math(call: AttentionCall) -> Tensor:
    """Run the operators one after the other, and add the mask in place.

    Source: `_scaled_dot_product_attention_math` in attention.cpp, which adds the mask out of place on fake tensors.
    """
    query, key, value, mask = call.query, call.key, call.value, call.mask
    dtype = query.dtype
    if mask is not None:
        mask = _additive(mask, dtype)
    if not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed():
        query, key, value = (t.float() if t.dtype in _HALF else t for t in (query, key, value))
    root = abs(_scale(call)) ** 0.5
    query = query * (root if _scale(call) >= 0 else -root)
    if call.is_causal:
        causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        mask = _additive(causal, query.dtype)
    if call.gqa and not query.shape[-3] == key.shape[-3] == value.shape[-3]:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    weights = query @ (key.transpose(-2, -1) * root)
    if mask is not None:
        weights.add_(mask)
    weights = torch._safe_softmax(weights, -1)
    if call.dropout_p > 0:
        weights = torch.dropout(weights, call.dropout_p, True)
    returned_beside = weights.to(dtype)  # the operator also returns the weights
    result = (weights @ value).to(dtype)
    del returned_beside
    return result
