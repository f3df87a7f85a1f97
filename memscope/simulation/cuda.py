"""What PyTorch does differently on CUDA, on tensors that stand for CUDA tensors.

A simulation runs fake CPU tensors (fake CUDA tensors abort a CPU build, and their backward needs a GPU even in a CUDA
build). Inside `cuda_semantics` those tensors are treated as PyTorch treats CUDA tensors; each difference has its source
here. On leaving, also by an exception, everything is as it was.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils

from memscope.simulation.autocast import cuda_autocast_policy

__all__ = ["cuda_semantics", "fake_tensors_use_foreach"]

aten = torch.ops.aten


@contextlib.contextmanager
def cuda_semantics(capability: tuple[int, int]) -> Iterator[None]:
    """CPU tensors are treated as CUDA tensors of a GPU with the compute capability `(major, minor)`."""
    with cuda_autocast_policy(), _fused_kernels(capability), _foreach_optimizers(), _CudaIsHere():
        yield


class _CudaIsHere(TorchFunctionMode):
    """A device named `cuda` in the target's own code is the one the stand-ins are on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        kwargs = kwargs or {}
        if func is not torch.device and any(_names_cuda(value) for value in (*args, *kwargs.values())):
            args = [_CPU if _names_cuda(value) else value for value in args]
            kwargs = {name: _CPU if _names_cuda(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


_CPU = torch.device("cpu")


def _names_cuda(value: Any) -> bool:
    kind = type(value)
    return (kind is torch.device and value.type == "cuda") or (kind is str and value.partition(":")[0] == "cuda")


@contextlib.contextmanager
def fake_tensors_use_foreach() -> Iterator[None]:
    """PyTorch lets only exact `Tensor` and `Parameter` use foreach kernels; a fake one stands for such.

    Source: `_foreach_supported_types` in torch/utils/_foreach_utils.py and torch/optim/optimizer.py (2.6 to 2.13).
    """
    lists: list[list[Any]] = [_foreach_utils._foreach_supported_types, torch_optimizer._foreach_supported_types]
    for supported in lists:
        supported.append(FakeTensor)
    try:
        yield
    finally:
        for supported in lists:
            supported.remove(FakeTensor)


@contextlib.contextmanager
def _foreach_optimizers() -> Iterator[None]:
    """Optimizers take their foreach implementation by default, with temporaries as large as what they update.

    Source: `_default_to_fused_or_foreach` in torch/optim/optimizer.py, which asks whether the device is CUDA
    (2.6 to 2.13).
    """
    asked: Any = torch_optimizer  # it looks this function up among its own names, and does not export it
    supported = asked._get_foreach_kernels_supported_devices
    asked._get_foreach_kernels_supported_devices = lambda: [*supported(), "cpu"]
    try:
        yield
    finally:
        asked._get_foreach_kernels_supported_devices = supported


@contextlib.contextmanager
def _fused_kernels(capability: tuple[int, int]) -> Iterator[None]:
    kernels: dict[str, Callable[..., Any]] = {
        "dropout": _dropout,
        "scaled_dot_product_attention": lambda *args, **kwargs: _attention(capability, *args, **kwargs),
    }
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that these kernels override others is the purpose
            for name, kernel in kernels.items():
                for key in ("AutogradCPU", "CPU"):
                    library.impl(name, kernel, key)
        yield
    finally:
        library._destroy()


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """One kernel that keeps a one-byte mask.

    Source: `is_fused_kernel_acceptable`, aten/src/ATen/native/Dropout.cpp (2.0 to 2.13).
    """
    if train and 0 < p < 1 and tensor.numel() > 0:
        return aten.native_dropout(tensor, p, train)[0]  # type: ignore[no-any-return]
    if p == 0 or not train or tensor.numel() == 0:
        return tensor
    return tensor * torch.zeros_like(tensor)  # p == 1


def _attention(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The first kernel that accepts the arguments: flash, memory-efficient, math.

    Source: `sdp_utils.cpp` and `attention.cpp` in aten/src/ATen/native/transformers (2.5 to 2.13).
    """
    if _flash_accepts(capability, query, key, value, attn_mask, is_causal, enable_gqa):
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if _efficient_accepts(capability, query, key, value, attn_mask):
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        bias = _bias(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, bias, keep, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _dense_heads(*tensors: Tensor) -> bool:
    return all(t.ndim == 4 and t.stride(-1) == 1 and t.numel() > 0 for t in tensors)


def _flash_accepts(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    gqa: bool,
) -> bool:
    head = query.shape[-1]
    heads_fit = query.shape[1] == key.shape[1] or (gqa and query.shape[1] % key.shape[1] == 0)
    small_head_for_backward = not (capability in ((8, 6), (8, 9)) and 192 < head <= 224 and query.requires_grad)
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and capability >= (8, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and mask is None
        and _dense_heads(query, key, value)
        and head == key.shape[-1] == value.shape[-1] <= 256
        and query.shape[0] == key.shape[0]
        and heads_fit
        and (not is_causal or query.shape[-2] == key.shape[-2])
        and small_head_for_backward
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    """Heads are padded to a multiple of 8 (`pad_last_dim<8>` in attention.cpp), the result is cut back."""
    head = query.shape[-1]
    missing = -head % 8
    scale = head**-0.5 if scale is None else scale
    if missing:
        query, key, value = (F.pad(t, (0, missing)) for t in (query, key, value))
    output: Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
    return output[..., :head] if missing else output


def _efficient_accepts(
    capability: tuple[int, int], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and half)
    alignment = max(4 if capability >= (8, 0) else 1, (8 if half else 4) if tensor_cores else 1)
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled()
        and capability >= (5, 0)
        and query.dtype in (torch.float32, torch.float16, *((torch.bfloat16,) if capability >= (8, 0) else ()))
        and query.dtype == key.dtype == value.dtype
        and _dense_heads(query, key, value)
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[-1] == key.shape[-1]
        and query.shape[-1] % alignment == 0 == value.shape[-1] % alignment
        and not (mask is not None and mask.requires_grad and mask.ndim != 4)
    )


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A boolean mask becomes an additive one, its last dimension padded to a multiple of 16.

    Source: `preprocess_mask` in attention.cpp.
    """
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), torch.full((), float("-inf"), dtype=query.dtype))
    length = key.shape[-2]
    if length % 16:
        mask = F.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], length)
