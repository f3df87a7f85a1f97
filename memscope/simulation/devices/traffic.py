"""Bytes that a kernel reads and writes in the device's memory, from what its operator is called with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["moved_bytes"]

_ALLOCATE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
"""Operators that take memory and leave in it what was there."""

_OVERWRITE = {
    "copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "scatter_",
    "index_copy_", "_foreach_copy_", "_foreach_zero_",
}  # fmt: skip
"""In-place operators that do not read what they write."""

_NOT_READ = {"nll_loss_backward": "self", "nll_loss2d_backward": "self"}
"""Arguments of which only the shape matters; so it is for all of `*_like` and `new_*`."""

_IN_PART = {
    **dict.fromkeys(("index", "index_select", "gather", "take"), ("self", "out")),
    "embedding": ("weight", "out"),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), ("self", "target")),
    **dict.fromkeys(("scatter_", "scatter_add_"), ("self", "index")),
    **dict.fromkeys(("index_add_", "index_copy_"), ("self", "source")),
    "index_put_": ("self", "values"),
}
"""Arguments read or written only where indices point, and what has as many elements as that: an argument, or `out`."""


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that one call reads and writes; 0 when no kernel runs: for views, metadata, memory that is only taken.

    Each tensor counts once, with the memory it has (an expanded dimension has one element), and once more when it is
    changed in place. What a kernel reads twice, keeps in caches or puts in a workspace is not counted, nor are sparse
    tensors.
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

    Fused optimizers write gradients back only where they divide them by the gradient scaler's factor
    (aten/src/ATen/native/cuda/fused_adam_utils.cuh, 2.6 to 2.13).
    """
    if op.startswith("_fused_") and argument.name == "grads":
        return given.get("grad_scale") is not None
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_read(op: str, argument: Any) -> bool:
    if argument.is_out or _NOT_READ.get(op) == argument.name or op.endswith("_like") or op.startswith("new_"):
        return False
    return not (op in _OVERWRITE and argument.alias_info is not None)
