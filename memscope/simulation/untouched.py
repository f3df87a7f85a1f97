"""What a simulation must leave as it was: the user's own tensors, on which nothing is computed.

A target can reach real tensors: its loss may use another model than the one that is trained, or count its calls in a
tensor. Autograd then gives these tensors fake gradients, and `FakeTensorMode` computes some operations in place on them
for real.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

__all__ = ["Untouched"]


class Untouched:
    """Context that restores real tensors and models on leaving, also after an exception."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._contents: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def __enter__(self) -> Untouched:
        return self

    def keep_model(self, model: nn.Module) -> None:
        """Remember a model's parameters, their gradients, and its buffers."""
        for module in model.modules():
            self._tables += [(table, dict(table)) for table in (module._parameters, module._buffers)]
        self._keep_gradients(model.parameters())

    def keep_arguments(self, values: Any, written: Iterable[Tensor]) -> None:
        """Remember the real tensors among an operator's arguments, and the contents of those it will write to."""
        self._keep_gradients(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
        for tensor in written:
            if type(tensor) is not FakeTensor and id(tensor) not in self._contents:
                with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
                    self._contents[id(tensor)] = tensor, tensor.clone()

    def _keep_gradients(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.requires_grad and tensor.is_leaf and type(tensor) is not FakeTensor:
                self._tensors.setdefault(id(tensor), (tensor, tensor.grad))

    def __exit__(self, *exception: object) -> None:
        for table, entries in self._tables:
            table.clear()
            table.update(entries)
        for tensor, gradient in self._tensors.values():
            tensor.grad = gradient
        with torch.no_grad():
            for tensor, contents in self._contents.values():
                tensor.copy_(contents)
