"""Estimate of the time of an operator's kernels on a device, from their arithmetic and memory traffic.

The estimate is the roofline model (Williams, Waterman, Patterson, Communications of the ACM 52(4), 2009): the time of a
call is that of its arithmetic or its memory traffic, whichever is longer. Matrix products are rounded up to whole tiles
(`products`). `timeline` adds the time in which the device waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memscope.hooks.work import NOTHING, Work, flops_of
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.devices.products import product_seconds, sizes_of_product
from memscope.simulation.devices.traffic import moved_bytes

__all__ = ["GAP_SECONDS", "KERNEL_SECONDS", "Roofline", "tf32_allowed"]

KERNEL_SECONDS = 2.9e-6
"""Time of a kernel with next to no work, and `GAP_SECONDS` that from the end of a kernel to the start of the next one.

Source: *Getting Started with CUDA Graphs* (developer.nvidia.com/blog/cuda-graphs, 2019), on a V100: a short kernel runs
for 2.9 µs, and one after the other, launched without waiting, they take 3.8 µs each.
"""

GAP_SECONDS = 0.9e-6
"""See `KERNEL_SECONDS`."""

_KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_EFFICIENT_ATTENTION = "_scaled_dot_product_efficient_attention"
_CONVOLUTIONS = ("convolution", "_convolution", "cudnn_convolution", "convolution_backward")


class Roofline:
    """Estimates calls on one device: `roofline(func, args, kwargs, out)` is the work of the call that returned `out`.

    Attributes:
        is_known: whether the device's rates are known; if not, only floating-point operations are counted.
        assumed: assumptions made in place of missing figures, as sentences.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._bandwidth = device.memory_bytes_per_second
        self.is_known = self._bandwidth is not None and device.flops_per_second("fp32") is not None
        self.assumed: set[str] = set()

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
        """Return the work of one call; `NOTHING` if it runs no kernel."""
        flops = flops_of(func, args, kwargs, out)
        if not self.is_known:
            return Work(flops, 0, 0.0) if flops else NOTHING
        moved = moved_bytes(func, args, kwargs, out)
        if not moved:
            return NOTHING
        assert self._bandwidth is not None, "is_known says so"
        arithmetic = self._arithmetic_seconds(flops, func, args, kwargs) if flops else 0.0
        return Work(flops, moved, max(arithmetic, moved / self._bandwidth, KERNEL_SECONDS) + GAP_SECONDS)

    def _arithmetic_seconds(self, flops: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        rate = self._rate(func, (*args, *kwargs.values()))
        sizes = sizes_of_product(func._overloadpacket.__name__, args)
        if sizes is None or not self._device.multiprocessors:
            return flops / rate
        assert self._bandwidth is not None, "is_known says so"
        return product_seconds(
            sizes,
            flops_per_second=rate,
            multiprocessors=self._device.multiprocessors,
            bytes_per_second=self._bandwidth,
        )

    def _rate(self, func: Any, values: tuple[Any, ...]) -> float:
        """Floating-point operations per second for the kind of arithmetic that an operator's kernel uses."""
        op = func._overloadpacket.__name__
        dtype = next(value.dtype for value in values if isinstance(value, Tensor))
        kind = _KINDS.get(dtype, str(dtype).removeprefix("torch."))
        tf32 = self._device.flops_per_second("tf32")
        if kind == "fp32" and tf32 is not None:
            if op.startswith(_EFFICIENT_ATTENTION):
                # Each fp32 product takes three TF32 products: OpMultiplyAddFastF32, for compute capability 8.0 and
                # later, in aten/src/ATen/native/transformers/cuda/mem_eff_attention/gemm_kernel_utils.h (2.0 to 2.13).
                return tf32 / 3
            if _allows_tf32(op):
                return tf32
        bf16 = self._device.flops_per_second("bf16")
        if kind.startswith("float8") and bf16 is not None:
            # Dense peaks of the H100 SXM: 1,978.9 and 989.4 TFLOPS (NVIDIA H100 Tensor Core GPU Architecture, 2022).
            self.assumed.add("float8 products take half as long as bf16 products")
            return 2 * bf16
        rate, fp32 = self._device.flops_per_second(kind), self._device.flops_per_second("fp32")
        if rate is None:
            self.assumed.add(f"{kind} products take as long as fp32 products")
            rate = fp32
        assert rate is not None, "is_known says so"
        return rate


def tf32_allowed() -> tuple[bool, bool]:
    """Whether PyTorch may now round fp32 to TensorFloat-32 in matrix products, and in convolutions."""
    return _allows_tf32("mm"), _allows_tf32("convolution")


def _allows_tf32(op: str) -> bool:
    """Whether PyTorch lets this operator round fp32 to TensorFloat-32: by default convolutions, not matrix products.

    Source: torch/backends/cuda/__init__.py and torch/backends/cudnn/__init__.py; `fp32_precision` since 2.9.
    """
    backend: Any = torch.backends.cuda.matmul
    if op in _CONVOLUTIONS:
        backend = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    precision = getattr(backend, "fp32_precision", None)
    return bool(backend.allow_tf32) if precision is None else precision == "tf32"
