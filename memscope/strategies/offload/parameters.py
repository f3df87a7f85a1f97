"""Frozen weights on the host: each layer's are on the device only while the layer runs, forward or backward.

The memory of a weight is resized to nothing and back, as FSDP does with gathered weights (`free_storage` and
`alloc_storage` in torch/distributed/fsdp/_fully_shard/_fsdp_param.py, 2.13): views that autograd has saved see the
weight again once it is back. The copies run on the computation's stream, so no work hides them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memscope.workload.batch import tensors_in

__all__ = ["LayersOnHost", "frozen_weights"]


def frozen_weights(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a layer that can be on the host: not trained, and alone in their memory."""
    for parameter in layer.parameters():
        plain: Any = parameter
        if parameter.requires_grad or is_traceable_wrapper_subclass(plain) or not parameter.numel():
            continue
        if parameter.untyped_storage().nbytes() == parameter.nbytes:
            yield parameter


class LayersOnHost:
    """Layers that run one after the other, with their frozen weights on the host."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._in_backward: _HostWeights | None = None
        self._copies: dict[int, Tensor] = {}
        for layer in {id(layer): layer for layer in layers}.values():
            weights = _HostWeights([(one, self._copy_of(one)) for one in frozen_weights(layer)])
            layer.register_forward_pre_hook(_Fetch(weights))
            layer.register_forward_hook(_Release(self, weights), always_call=True)
            weights.release()

    def _copy_of(self, parameter: nn.Parameter) -> Tensor:
        """The weight on the host; layers that share it share the copy."""
        if id(parameter) not in self._copies:
            copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda, requires_grad=False)
            self._copies[id(parameter)] = copy.copy_(parameter.detach())
        return self._copies[id(parameter)]

    def begin_backward(self, weights: _HostWeights) -> None:
        """The backward pass reaches a layer, and leaves the one before: it runs nodes in reverse order."""
        if self._in_backward is None:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.end_backward)
        elif self._in_backward is not weights:
            self._in_backward.release()
        self._in_backward = weights
        weights.fetch()

    def end_backward(self) -> None:
        """The backward pass has ended."""
        if self._in_backward is not None:
            self._in_backward.release()
        self._in_backward = None


class _HostWeights:
    """The weights of one layer, each with its copy on the host."""

    def __init__(self, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
        self._pairs = pairs

    def fetch(self) -> None:
        for parameter, copy in self._pairs:
            storage = parameter.untyped_storage()
            if not storage.nbytes():
                storage.resize_(copy.nbytes)
                parameter.data.copy_(copy, non_blocking=True)  # no change that autograd counts

    def release(self) -> None:
        for parameter, _ in self._pairs:
            parameter.untyped_storage().resize_(0)


class _Fetch:
    """A hook before a layer's forward."""

    def __init__(self, weights: _HostWeights) -> None:
        self._weights = weights

    def __call__(self, layer: nn.Module, args: Any) -> None:
        self._weights.fetch()


class _Release:
    """A hook after a layer's forward, which waits for the gradients of its results."""

    def __init__(self, layers: LayersOnHost, weights: _HostWeights) -> None:
        self._layers, self._weights = layers, weights

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._weights.release()
        for result in tensors_in(output):
            if result.requires_grad:
                result.register_hook(self._reached)

    def _reached(self, gradient: Tensor) -> None:
        self._layers.begin_backward(self._weights)
