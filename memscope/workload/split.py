"""Split the batch of a step into micro-batches."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from memscope.errors import UsageError
from memscope.workload.batch import leaves_of, map_leaves, tensors_in

__all__ = ["first_dimension", "sample_counts", "split_batch"]


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split a batch into `parts` pieces with the same number of samples.

    The samples are the first dimension of every tensor, and the items of every list. A list that holds tensors, such as
    the `[inputs, labels]` of a `DataLoader`, is a list of columns instead, and each column is split. Every other value
    is copied into each piece unchanged.

    Raises:
        UsageError: the batch is empty, its number of samples is not divisible by `parts`, it has no tensor or list of
            samples, or its tensors and lists have different numbers of samples.
    """
    if parts == 1:
        return [batch]
    counts = sample_counts(batch)
    if len(counts) != 1:
        found = " and ".join(map(str, counts)) or "none"
        raise UsageError(
            f"a step's batch of type {type(batch).__name__} cannot be split into {parts} micro-batches: expected the "
            f"same number of samples in all tensors and lists, found {found}; set the workload's own `split`"
        )
    (samples,) = counts
    if samples == 0:
        raise UsageError(f"a step's batch is empty and cannot be split into {parts} micro-batches: check the data")
    if samples % parts:
        raise UsageError(
            f"a step's batch of {samples} samples cannot be split into {parts} equal micro-batches: "
            f"choose a number of micro-batches that divides {samples}"
        )
    pieces = [slice(start, start + samples // parts) for start in range(0, samples, samples // parts)]
    return [map_leaves(partial(_part, piece), batch, _is_list_of_samples) for piece in pieces]


def sample_counts(batch: Any) -> list[int]:
    """The distinct numbers of samples in a batch's tensors and lists, as `split_batch` counts them; normally one."""
    return sorted({len(leaf) for leaf in leaves_of(batch, _is_list_of_samples) if _has_samples(leaf)})


def _part(piece: slice, leaf: Any) -> Any:
    return leaf[piece] if _has_samples(leaf) else leaf


def _is_list_of_samples(node: Any) -> bool:
    return isinstance(node, list) and not any(isinstance(item, Tensor) for item in node)


def _has_samples(leaf: Any) -> bool:
    return leaf.ndim > 0 if isinstance(leaf, Tensor) else isinstance(leaf, list)


def first_dimension(micro_batch: Any) -> float:
    """Number of samples: the first dimension of the first tensor that has dimensions; 1 without such a tensor."""
    return next((float(tensor.shape[0]) for tensor in tensors_in(micro_batch) if tensor.ndim), 1.0)
