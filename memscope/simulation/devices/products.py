"""Time of a matrix product whose tiles do not fill the multiprocessors of a device.

A kernel divides the result into tiles, and each multiprocessor computes one tile at a time. A tile that reaches beyond
the result costs as much as a whole one (tile quantization), and so does a round in which some multiprocessors have no
tile (wave quantization). Source: NVIDIA, Matrix Multiplication Background User's Guide (DU-09799-001, February 2023),
sections 2.3, 3.1 and 3.2.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

__all__ = ["product_seconds", "sizes_of_product"]

_TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64))
"""Rows and columns of the tiles that cuBLAS uses: section 2.3 of the guide."""

_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Parts of the inner dimension that kernels compute apart, to fill the device; the parts are then added."""

_PARTIAL_BYTES = 4
"""Partial sums are float32, also for products of 16-bit numbers."""

_OPERANDS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}
"""Operator → position of its first factor; the second one follows."""


def sizes_of_product(op: str, args: tuple[Any, ...]) -> tuple[int, int, int, int] | None:
    """Number of products, rows, columns and inner size of a call; None for an operator that is no matrix product."""
    first = _OPERANDS.get(op)
    if first is None or len(args) < first + 2 or not all(isinstance(arg, Tensor) for arg in args[first : first + 2]):
        return None
    left, right = args[first], args[first + 1]
    return (left.size(0) if left.ndim == 3 else 1), left.size(-2), right.size(-1), left.size(-1)


@cache
def product_seconds(
    sizes: tuple[int, int, int, int], *, flops_per_second: float, multiprocessors: int, bytes_per_second: float
) -> float:
    """Seconds of the arithmetic of a product, with the tile and the split of the inner dimension that are fastest.

    Args:
        sizes: number of products, rows, columns and inner size.
        flops_per_second: rate of the whole device for large products.
        multiprocessors: streaming multiprocessors of the device.
        bytes_per_second: bandwidth of the device's memory, for partial sums, which are written and read once.
    """
    products, rows, columns, inner = sizes
    partial_seconds = 2 * _PARTIAL_BYTES * products * rows * columns / bytes_per_second
    each = flops_per_second / multiprocessors
    fastest = float("inf")
    for height, width in _TILES:
        tiles = products * -(-rows // height) * -(-columns // width)
        for parts in _SPLITS:
            waves = -(-tiles * parts // multiprocessors)
            seconds = waves * 2 * height * width * -(-inner // parts) / each
            fastest = min(fastest, seconds + (parts * partial_seconds if parts > 1 else 0.0))
    return fastest
