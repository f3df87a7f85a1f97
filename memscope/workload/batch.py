"""The tensors of a batch, in whatever it keeps them.

Lists, tuples, dicts and what else `torch.utils._pytree` knows; dataclasses; `collections.UserDict`, as transformers'
`BatchEncoding` is one.
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
    """The batch with `change(leaf)` in the place of every leaf; the batch itself stays as it is.

    Args:
        change: gives what to put in a leaf's place.
        batch: tensors and anything else, in whatever keeps them.
        is_leaf: says of what keeps others that it is a leaf itself.
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
    """The batch with `change(tensor)` in the place of every tensor."""
    return map_leaves(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def tensors_in(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    return [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]


def _with(kept: Any, values: dict[str, Any]) -> Any:
    copied = copy.copy(kept)
    for name, value in values.items():
        object.__setattr__(copied, name, value)  # in a frozen one too: the copy is nobody else's yet
    return copied
