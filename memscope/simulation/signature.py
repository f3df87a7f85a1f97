"""What a call of an operator on fake tensors looks like: all that its results and its kernel depend on."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["describe_call"]

_HASHABLE = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def describe_call(args: Any, kwargs: dict[str, Any], parts: list[Any], tensors: list[FakeTensor]) -> bool:
    """Append to `parts` all that determines the results, and to `tensors` the tensors; returns False if unusual.

    The parts are hashable. Unusual are known constants, sparse layouts, and arguments of other types.
    """
    if kwargs:
        return _describe(args, parts, tensors) and _describe_named(kwargs, parts, tensors)
    return _describe(args, parts, tensors)


def _describe(values: Any, parts: list[Any], tensors: list[FakeTensor]) -> bool:
    """Append to `parts` everything that determines the results; return False for unusual values."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.layout is not torch.strided or value.is_neg():
                return False
            tensors.append(value)
            dtype = value.dtype
            parts += (dtype, value.size(), value.stride(), value.storage_offset(), dtype.is_complex and value.is_conj())
        elif kind in _HASHABLE:
            parts += (kind, value)
        elif kind is list or kind is tuple:
            parts += (kind, len(value))
            if not _describe(value, parts, tensors):
                return False
        else:
            return False
    return True


def _describe_named(kwargs: dict[str, Any], parts: list[Any], tensors: list[FakeTensor]) -> bool:
    parts += kwargs
    return _describe(kwargs.values(), parts, tensors)
