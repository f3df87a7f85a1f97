"""Bytes that a kernel reads and writes in device memory, derived from the arguments of its operator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["moved_bytes"]

_ALLOCATE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
"""Operators that allocate memory without writing to it."""

_OVERWRITE = {
    "copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "scatter_",
    "index_copy_", "_foreach_copy_", "_foreach_zero_",
}  # fmt: skip
"""In-place operators that do not read the tensor they write."""

_ONLY_READ = {"g", "qmap1", "qmap2"}
"""Arguments of bitsandbytes' optimizers that its schemas mark as changed, though its kernels only read them.

Source: what is stored in bitsandbytes/backends/triton/kernels_optim.py (0.50.2)."""

_NOT_READ = {"nll_loss_backward": "self", "nll_loss2d_backward": "self"}
"""Operator → argument of which only the shape matters; the same applies to all arguments of `*_like` and `new_*`."""

_IN_PART = {
    **dict.fromkeys(("index", "index_select", "gather", "take"), ("self", "out")),
    "embedding": ("weight", "out"),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), ("self", "target")),
    **dict.fromkeys(("scatter_", "scatter_add_"), ("self", "index")),
    **dict.fromkeys(("index_add_", "index_copy_"), ("self", "source")),
    "index_put_": ("self", "values"),
}
"""Operator → argument accessed only at given indices, and the argument (or `out`) with as many elements as accesses."""


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the bytes that one call reads and writes; 0 where no kernel runs (views, metadata, allocation only).

    Each tensor counts once, with the memory it occupies (an expanded dimension has one element), and a second time if
    it is changed in place. Repeated reads, caches, workspaces and sparse tensors are not counted.
    """
    name = func._overloadpacket.__name__
    if name in _ALLOCATE or torch.Tag.inplace_view in func.tags:
        return 0
    if not func._schema.is_mutable and not _tensors(out):
        return 0
    schema = {argument.name: argument for argument in func._schema.arguments}
    given = dict(zip(schema, args, strict=False)) | kwargs
    storages = {t.untyped_storage()._cdata for value in given.values() for t in _tensors(value)}
    made = [t for t in _tensors(out) if t.untyped_storage()._cdata not in storages]
    changed = {key for key in given if _is_changed(name, schema[key], given) and _tensors(given[key])}
    if not made and not changed:
        return 0
    moved = sum(map(_bytes, made))
    for key, value in given.items():
        times = (key in changed) + _is_read(name, schema[key])
        part, like = _IN_PART.get(name, ("", ""))
        if key == part:
            elements = sum(t.numel() for t in _tensors(out if like == "out" else given[like]))
            moved += times * elements * value.element_size()
        else:
            moved += times * sum(map(_bytes, _tensors(value)))
    return moved


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return [item for item in values if isinstance(item, Tensor) and item.layout is torch.strided]


def _bytes(tensor: Tensor) -> int:
    sizes = zip(tensor.size(), tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


def _is_changed(op: str, argument: Any, given: Mapping[str, Any]) -> bool:
    """Whether a kernel writes to an argument.

    Fused optimizers write gradients only to divide them by the gradient scaler's factor
    (aten/src/ATen/native/cuda/fused_adam_utils.cuh, 2.6 to 2.13).
    """
    if op.startswith("_fused_") and argument.name == "grads":
        return given.get("grad_scale") is not None
    if op.startswith("optimizer_update_") and argument.name in _ONLY_READ:
        return False
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_read(op: str, argument: Any) -> bool:
    if argument.is_out or _NOT_READ.get(op) == argument.name or op.endswith("_like") or op.startswith("new_"):
        return False
    return not (op in _OVERWRITE and argument.alias_info is not None)
