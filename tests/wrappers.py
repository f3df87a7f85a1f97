"""Wrapper subclasses as libraries write them: tensors that hold other tensors and have no memory of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

__all__ = ["Opaque", "Pair", "Quantized"]

aten = torch.ops.aten


class Quantized(Tensor):
    """A weight `[rows, columns]` in int8, with a scale `[rows, 1]` in the dtype that it reports."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.quantized, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["quantized", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], context: None, size: Any, stride: Any) -> Quantized:
        return cls(inner["quantized"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.clone.default):
            return cls(func(args[0].quantized), func(args[0].scale))
        dequantized = lambda tensor: tensor.quantized.to(tensor.scale.dtype) * tensor.scale  # noqa: E731
        args, kwargs = pytree.tree_map_only(cls, dequantized, (args, kwargs or {}))
        return func(*args, **kwargs)


class Pair(Tensor):
    """Two tensors of the same shape, each computed as one would be."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, one: Tensor, two: Tensor) -> Pair:
        return Tensor._make_wrapper_subclass(
            cls, one.shape, strides=one.stride(), dtype=one.dtype, device=one.device, requires_grad=one.requires_grad
        )

    def __init__(self, one: Tensor, two: Tensor) -> None:
        self.one, self.two = one, two

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["one", "two"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Pair:
        return cls(inner["one"], inner["two"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = []
        for name in ("one", "two"):
            own_args, own_kwargs = pytree.tree_map_only(
                cls, lambda pair, name=name: getattr(pair, name), (args, kwargs)
            )
            results.append(func(*own_args, **own_kwargs))
        one, spec = pytree.tree_flatten(results[0])
        paired = [
            cls(a, b) if isinstance(a, Tensor) else a for a, b in zip(one, pytree.tree_leaves(results[1]), strict=True)
        ]
        return return_and_correct_aliasing(func, args, kwargs, pytree.tree_unflatten(paired, spec))


class Opaque(Pair):
    """A wrapper that cannot be taken apart."""

    __tensor_flatten__ = __tensor_unflatten__ = property()  # type: ignore[assignment]
