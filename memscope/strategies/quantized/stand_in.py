"""Layers that stand in for those of bitsandbytes where it is not installed: same memory, no values.

A simulation needs no more. Left out are kernels that multiply with the packed weight itself, which bitsandbytes
chooses for some shapes of up to 1,536 rows: here every product unpacks its weight first. Source: nn/modules.py,
functional.py and autograd/_functions.py of bitsandbytes 0.50.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from memscope.strategies.quantized import kernels

__all__ = ["Int8Params", "Linear4bit", "Linear8bitLt", "Params4bit", "int8_vectorwise_quant", "quantize_4bit"]

_VALUES, _VALUES_OF_SCALES = 16, 256
"""Values of a 4-bit type, and of the 8-bit type in which the scales are quantized."""
_BLOCK_OF_SCALES = 256


class Params4bit(nn.Parameter):
    """The class of a 4-bit weight; only fake tensors are quantized here, and they have no class of their own."""


class Int8Params(nn.Parameter):
    """The class of an 8-bit weight; see `Params4bit`."""


@dataclass
class QuantState:
    """What belongs to a 4-bit weight: the scale of each block, and the values of the 4-bit type."""

    absmax: Tensor
    code: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    offset: Tensor | None = None
    state2: Any = None


def quantize_4bit(
    values: Tensor, *, blocksize: int, compress_statistics: bool, quant_type: str
) -> tuple[Tensor, QuantState]:
    """The packed weight `[⌈n / 2⌉, 1]` and its state."""
    blocks = -(-values.numel() // blocksize)
    scales = values.new_empty(blocks, dtype=torch.float32)
    packed = values.new_empty(((values.numel() + 1) // 2, 1), dtype=torch.uint8)
    code = values.new_empty(_VALUES, dtype=torch.float32)
    state = QuantState(scales, code, values.shape, values.dtype, blocksize, quant_type)
    if compress_statistics:
        state.offset = scales.mean()
        state.state2 = SimpleNamespace(
            absmax=values.new_empty(-(-blocks // _BLOCK_OF_SCALES), dtype=torch.float32),
            code=values.new_empty(_VALUES_OF_SCALES, dtype=torch.float32),
            blocksize=_BLOCK_OF_SCALES,
        )
        state.absmax = torch.empty_like(scales, dtype=torch.uint8)
    return packed, state


def int8_vectorwise_quant(values: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values in 8 bits, the scale of each row, and the columns with outliers."""
    return kernels.int8_vectorwise_quant(_ops, values, threshold)


class Linear4bit(nn.Linear):
    """A linear layer with a 4-bit weight."""

    quant_state: QuantState

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        device: Any,
        compute_dtype: torch.dtype | None,
        compress_statistics: bool,
        quant_type: str,
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, device=device)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`, of the input's dtype."""
        if self.compute_dtype is None and x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        given = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        bias: Any = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias.data = bias.data.to(x.dtype)
        weight, multiply = self._parameters["weight"], cast(Any, _MatMul4Bit).apply
        return multiply(x, weight, bias, cast(Any, weight).quant_state).to(given)  # type: ignore[no-any-return]


class _MatMul4Bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState) -> Tensor:
        ctx.state, ctx.packed = state, packed
        ctx.bias_dtype = None if bias is None else bias.dtype
        if state.state2 is None:
            product = kernels.gemm_4bit(
                _ops, values, packed, state.shape, state.absmax, state.blocksize, state.quant_type, bias
            )
        else:
            scales = (bias, state.absmax, state.state2.code, state.offset)
            nested = state.state2.absmax
            product = kernels.gemm_4bit(
                _ops, values, packed, state.shape, nested, state.blocksize, state.quant_type, *scales
            )
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        of_bias = grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, None, of_bias, None
        return torch.matmul(grad, _unpacked(ctx.packed, ctx.state).to(grad.dtype)), None, of_bias, None


def _unpacked(packed: Tensor, state: QuantState) -> Tensor:
    scales = state.absmax
    if state.state2 is not None:
        nested = state.state2
        scales = _ops.dequantize_blockwise.default(scales, nested.absmax, nested.code, nested.blocksize, torch.float32)
        scales += state.offset
    return _ops.dequantize_4bit.default(  # type: ignore[no-any-return]
        packed, scales, state.blocksize, state.quant_type, state.shape, state.dtype
    )


@dataclass
class _State8bit:
    """What belongs to an 8-bit layer; the names are those of `MatmulLtState`."""

    threshold: float
    CB: Any = None
    SCB: Any = None
    idx: Tensor | None = None
    """Columns with outliers in the last input."""


class Linear8bitLt(nn.Linear):
    """A linear layer with an 8-bit weight."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, device: Any, has_fp16_weights: bool, threshold: float
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, device=device)
        self.state, self.index = _State8bit(threshold), None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`, of the input's dtype."""
        weight: Any = self.weight
        if weight.CB is not None:
            self.state.CB, self.state.SCB, weight.CB, weight.SCB = weight.CB, weight.SCB, None, None
        bias: Any = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias.data = bias.data.to(x.dtype)
        return cast(Any, _MatMul8bitLt).apply(x, self.weight, bias, self.state)  # type: ignore[no-any-return]


class _MatMul8bitLt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, state: _State8bit) -> Tensor:
        ctx.shape, ctx.state = values.shape, state
        if values.dim() == 3:
            values = values.reshape(-1, values.shape[-1])
        rounded, scales, columns = int8_vectorwise_quant(values.to(torch.float16), state.threshold)
        outliers = None
        if state.threshold:
            state.idx = columns
            product, outliers = kernels.int8_mixed_scaled_mm(
                _ops, values, rounded, state.CB, scales, state.SCB, columns, bias
            )
        else:
            product = kernels.int8_scaled_mm(_ops, rounded, state.CB, scales, state.SCB, bias, values.dtype)
        ctx.dtype, ctx.bias_dtype = values.dtype, None if bias is None else bias.dtype
        ctx.kept = (outliers, values, columns) if ctx.needs_input_grad[0] else None
        return product.reshape(*ctx.shape[:-1], product.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        of_bias = grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        if grad.dim() == 3:
            grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        if not ctx.needs_input_grad[0]:
            return None, None, of_bias, None
        state = ctx.state
        weight = state.CB.to(ctx.dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))
        return torch.matmul(grad.to(ctx.dtype), weight).view(ctx.shape), None, of_bias, None


def _defined() -> Any:
    """Operators with the names and arguments of bitsandbytes', for fake tensors; defined once in a process."""
    defined = torch.library.Library("memscope", "FRAGMENT")
    for name, (schema, result) in _OPERATORS.items():
        defined.define(name + schema)
        defined._register_fake(name, result)
    return defined


_OPERATORS: dict[str, tuple[str, Any]] = {
    "dequantize_blockwise": (
        "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
        lambda values, absmax, code, blocksize, dtype: torch.empty_like(values, dtype=dtype),
    ),
    "dequantize_4bit": (
        "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
        lambda values, absmax, blocksize, quant_type, shape, dtype: values.new_empty(shape, dtype=dtype),
    ),
    "int8_linear_matmul": (
        "(Tensor A, Tensor B) -> Tensor",
        lambda one, other: one.new_empty((*one.shape[:-1], other.shape[0]), dtype=torch.int32),
    ),
    "int8_vectorwise_dequant": (
        "(Tensor A, Tensor stats) -> Tensor",
        lambda values, stats: torch.empty_like(values, dtype=torch.float32),
    ),
}
_LIBRARY = _defined()
_ops: Any = torch.ops.memscope
