"""The vocabulary of a trace's columns: categories, phases, and the keys to group by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

__all__ = ["CATEGORIES", "KEYS", "MARK_COLUMNS", "PHASES", "Bools", "Category", "Ints", "Key", "Phase", "columns_of"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

Category = Literal[
    "parameter", "weight_copy", "buffer", "gradient", "optimizer_state", "activation", "input", "temporary",
    "workspace", "other",
]  # fmt: skip
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""What memory is used for. `weight_copy`: a cast of a parameter. `activation`: made by the forward pass (or its
recomputation) and still alive when the backward pass that needs it begins. `temporary`: freed before that.
`workspace`: allocated inside a kernel. `other`: outlives its step and has no known owner."""

Phase = Literal["setup", "forward", "loss", "backward", "recompute", "optimizer", "zero_grad", "outside", "inference"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Parts of a training step. `recompute`: forward work that activation checkpointing repeats inside the backward pass.
`outside`: between steps and, in a loop that does not mark its phases, between forward, backward and optimizer."""

Key = Literal["category", "module", "op", "phase", "step", "micro_batch"]
KEYS: tuple[Key, ...] = get_args(Key)
MARK_COLUMNS = ("mark_event", "mark_phase", "mark_step", "mark_micro_batch")


def columns_of(names: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Turn rows of integers, each in the order of `names`, into columns by name: int64 `[rows]`, to build a `Trace`."""
    table = np.array(rows, dtype=np.int64).reshape(-1, len(names)).T
    return {name: np.ascontiguousarray(column) for name, column in zip(names, table, strict=True)}
