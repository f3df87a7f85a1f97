"""Take tensors apart into the strided tensors that hold their memory.

A wrapper subclass, such as a shard of FSDP2 (DTensor) or a quantized weight of torchao, reports the shape of what it
stands for and holds other tensors; its own storage has no memory. Sparse tensors hold indices and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memscope.errors import UsageError

__all__ = ["PLAIN", "held_by", "is_wrapper", "parts_of"]

PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor, UninitializedParameter, UninitializedBuffer))
"""The classes of tensors that operators below autograd work on. Those of lazy modules have no elements yet."""
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def parts_of(tensor: Any) -> list[Tensor]:
    """The strided tensors that hold a tensor's memory: itself, or what it is made of, in nested wrappers too.

    Raises:
        UsageError: the tensor wraps others that cannot be found.
    """
    if type(tensor) not in PLAIN:
        if is_wrapper(tensor):
            return [part for inner in held_by(tensor).values() for part in parts_of(inner)]
        if _is_hollow(tensor):
            raise UsageError(_refusal(tensor, "its class has no __tensor_flatten__ and __tensor_unflatten__"))
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in _COMPRESSED:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        ends = [tensor.crow_indices(), tensor.col_indices()] if rows else [tensor.ccol_indices(), tensor.row_indices()]
        return [*ends, tensor.values()]
    raise UsageError(_refusal(tensor, f"its layout is {tensor.layout}"))


def is_wrapper(tensor: object) -> bool:
    """Whether a tensor is a wrapper that can be taken apart."""
    return is_traceable_wrapper_subclass(tensor)


def held_by(wrapper: Any) -> dict[str, Tensor]:
    """The tensors that a wrapper names, by attribute; it may name others too, as DTensor names its mesh."""
    named = {name: getattr(wrapper, name) for name in wrapper.__tensor_flatten__()[0]}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor's storage has a size but no memory, as `Tensor._make_wrapper_subclass` leaves it."""
    storage = tensor.untyped_storage()
    if tensor.layout is not torch.strided or storage.device.type == "meta":
        return False
    try:
        return storage.nbytes() > 0 and storage.data_ptr() == 0
    except RuntimeError:  # PyTorch's answer for such a storage
        return True


def _refusal(tensor: Tensor, why: str) -> str:
    kind = type(tensor)
    return (
        f"the memory of a tensor {list(tensor.shape)} of class {kind.__module__}.{kind.__qualname__} cannot be "
        f"counted: it stands for other tensors, and {why}. Use tensors that can be taken apart "
        "(torch.utils._python_dispatch.is_traceable_wrapper_subclass)"
    )
