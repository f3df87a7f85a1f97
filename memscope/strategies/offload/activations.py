"""Tensors that a layer, or the whole step, saves for its backward move to pinned memory of the host until then.

This differs from `torch.autograd.graph.save_on_cpu(pin_memory=True)` in two ways. A piece of memory is copied once in
each direction, however many saved tensors are views of it. Memory that the device holds anyway stays: parameters and
buffers, and arguments without gradient (the batch; of a layer, what layers share: masks, rotary tables). A cast weight
is a tensor of its own, and moves. The copies run on the computation's stream, so no work hides them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memscope.workload.batch import tensors_in

__all__ = ["Offloaded"]


class Offloaded:
    """A forward or loss function whose saved tensors live on the host. On the CPU they stay where they are."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self.__wrapped__ = forward  # for its signature, and its line in messages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        shared = [tensor for tensor in tensors_in((args, kwargs)) if not tensor.requires_grad]
        held = [*self.model.parameters(), *self.model.buffers(), *shared]
        trip = _Trip(frozenset(tensor.untyped_storage()._cdata for tensor in held if tensor.layout is torch.strided))
        try:
            with saved_tensors_hooks(trip.pack, _unpack):
                return self.forward(*args, **kwargs)
        finally:  # autograd keeps the hook with every tensor it packed, and with it the memory of all of them
            trip.moved.clear()


@dataclass(eq=False)
class _OnHost:
    """A piece of device memory that is on the host."""

    storage: weakref.ref[torch.UntypedStorage]
    """Its storage on the device, to distinguish it from a later storage at the same address."""
    copy: Tensor
    device: torch.device
    back: Tensor | None = None
    """The copy on the device, from the first use in the backward pass until autograd lets go of the last one."""

    def restored(self) -> Tensor:
        """The whole piece, on the device again."""
        if self.back is None:
            self.back = self.copy.to(self.device, non_blocking=True)
        return self.back


@dataclass(frozen=True, eq=False)
class _Packed:
    """A saved tensor: a view of a piece of memory."""

    memory: _OnHost
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class _Trip:
    """One forward pass of one layer."""

    held: frozenset[int]
    """Storages that stay on the device."""
    moved: dict[tuple[Any, ...], _OnHost] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        """Called by autograd to save a tensor, which is already detached."""
        if tensor.layout is not torch.strided or not tensor.numel() or tensor.untyped_storage()._cdata in self.held:
            return tensor
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version, tensor.dtype, tensor.is_conj(), tensor.is_neg())
        memory = self.moved.get(key)
        if memory is None or memory.storage() is not storage:
            whole = tensor.as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            copy = _on_host(whole)
            if copy is whole:
                return tensor
            memory = self.moved[key] = _OnHost(weakref.ref(storage), copy, tensor.device)
        return _Packed(memory, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which a GPU reads and writes at full speed; the tensor itself if it is on the host.

    An asynchronous copy to the host is pinned: `_to_copy` in aten/src/ATen/native/TensorConversions.cpp (2.6 to 2.13).
    """
    return tensor.to("cpu", non_blocking=True)


def _unpack(packed: Tensor | _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.memory.restored().as_strided(packed.size, packed.stride, packed.offset)
