"""What bitsandbytes' products allocate on a GPU, step by step, for runs in which no real kernel runs.

Each function takes the operators to call: those of bitsandbytes, or those that stand in for them. Source:
backends/cuda/ops.py and backends/default/ops.py of bitsandbytes 0.50.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OUTLIER_COLUMNS", "gemm_4bit", "int8_mixed_scaled_mm", "int8_scaled_mm", "int8_vectorwise_quant"]

OUTLIER_COLUMNS = 7
"""Columns of a layer's input with a value of 6.0 or more, which LLM.int8() multiplies in 16 bits.

Source: Dettmers et al., "LLM.int8()", 2022, section 3.2: at most 7 in transformers of up to 13 billion parameters.
"""


def gemm_4bit(
    ops: Any,
    values: Tensor,
    weight: Tensor,
    shape: Any,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    *scales: Tensor | None,
) -> Tensor:
    """The product with a 4-bit weight that is unpacked first, as `_dequant_linear_fallback` allocates.

    Args:
        ops: the operators.
        values: `[..., in]`.
        weight: the packed weight.
        shape: `[out, in]`.
        absmax: the largest magnitude of each block in float32, or, with double quantization, of each block of these.
        blocksize: elements of a block.
        quant_type: nf4 or fp4.
        scales: bias; with double quantization, also the magnitudes in 8 bits, their code and their offset.
    """
    given: list[Any] = [*scales, None, None, None, None]
    bias, in_8bit, code, offset = given[:4]
    if in_8bit is not None:
        unpacked = ops.dequantize_blockwise.default(in_8bit, absmax, code, 256, torch.float32)
        absmax = unpacked + offset  # beside `unpacked`, which lives until the function returns
    whole = ops.dequantize_4bit.default(weight, absmax, blocksize, quant_type, shape, values.dtype)
    return F.linear(values, whole, bias)


def int8_vectorwise_quant(ops: Any, values: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values in 8 bits, the scale of each row, and the columns that hold outliers.

    Args:
        ops: the operators.
        values: `[rows, columns]` in float16.
        threshold: magnitude from which a value is an outlier; 0: there are none.
    """
    scales = values.new_empty(values.numel() // values.shape[-1], dtype=torch.float32)
    rounded = torch.empty_like(values, dtype=torch.int8)
    if not threshold:
        return rounded, scales, None
    outliers = values.abs() >= threshold
    outliers.any()
    columns = torch.arange(min(OUTLIER_COLUMNS, values.shape[-1]), device=values.device)
    outliers.any(dim=0)
    rounded[:, columns] = 0
    return rounded, scales, columns


def int8_scaled_mm(
    ops: Any,
    values: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The product of two matrices in 8 bits: in int32, then scaled to float16, then in `dtype`."""
    product = ops.int8_linear_matmul.default(values, weight)
    scaled = torch.empty_like(product, dtype=torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        scaled.add_(bias)
    return scaled.to(dtype or torch.float16)


def int8_mixed_scaled_mm(
    ops: Any,
    values: Tensor,
    rounded: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The product in 8 bits, plus that of the columns with outliers in 16 bits; and these columns of the values."""
    if columns is None or not columns.numel():
        outliers, of_weight = values.new_empty(0), None
    else:
        outliers = values[:, columns].contiguous()
        of_weight = ops.int8_vectorwise_dequant.default(weight[:, columns].contiguous(), column_scales)
        of_weight = of_weight.to(values.dtype).t()
    product = int8_scaled_mm(ops, rounded, weight, row_scales, column_scales, bias, values.dtype)
    return (product if of_weight is None else product.addmm(outliers, of_weight)), outliers
