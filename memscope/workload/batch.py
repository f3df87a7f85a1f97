"""The tensors of a batch, inside nested containers.

Containers are those of `torch.utils._pytree` (lists, tuples, dicts, …), dataclasses, and `collections.UserDict`, which
transformers' `BatchEncoding` derives from.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["leaves_of", "map_leaves", "map_tensors", "tensors_in"]

IsLeaf = Callable[[Any], bool]


def map_leaves(change: Callable[[Any], Any], batch: Any, is_leaf: IsLeaf | None = None) -> Any:
    """A copy of the batch with every leaf replaced by `change(leaf)`; the batch itself is unchanged.

    Args:
        change: returns the replacement of a leaf.
        batch: tensors and other values, in nested containers.
        is_leaf: whether a container counts as a leaf itself.
    """

    def mapped(leaf: Any) -> Any:
        if is_leaf is None or not is_leaf(leaf):
            if isinstance(leaf, UserDict):
                return _with(leaf, {"data": map_leaves(change, leaf.data, is_leaf)})
            if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
                names = [field.name for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)]
                return _with(leaf, {name: map_leaves(change, getattr(leaf, name), is_leaf) for name in names})
        return change(leaf)

    return pytree.tree_map(mapped, batch, is_leaf=is_leaf)


def leaves_of(batch: Any, is_leaf: IsLeaf | None = None) -> list[Any]:
    """Every leaf of a batch, in order; see `map_leaves`."""
    found: list[Any] = []
    map_leaves(found.append, batch, is_leaf)
    return found


def map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A copy of the batch with every tensor replaced by `change(tensor)`."""
    return map_leaves(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def tensors_in(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    return [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]


def _with(kept: Any, values: dict[str, Any]) -> Any:
    copied = copy.copy(kept)
    for name, value in values.items():
        object.__setattr__(copied, name, value)  # frozen dataclasses too: nothing else refers to the copy yet
    return copied
