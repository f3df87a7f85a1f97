"""The micro-batches of one step, and of every step of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memscope.errors import UsageError
from memscope.workload.description import Workload

__all__ = ["Choose", "MicroBatch", "micro_batches", "prepare_steps"]


@dataclass(frozen=True)
class MicroBatch:
    """One piece of a step's batch, still on the host, and its share of the step's loss (shares sum to 1)."""

    data: Any
    share: float


def micro_batches(workload: Workload, batch: Any) -> list[MicroBatch]:
    """Split one step's batch as the plan says; the shares make accumulation equal to a step on the whole batch.

    A piece with zero weight is left out: its mean loss would be 0 / 0.

    Raises:
        UsageError: the batch cannot be split, or its total weight is zero.
    """
    pieces = workload.split(batch, workload.plan.micro_batches)
    weights = [workload.weight(piece) for piece in pieces]
    total = sum(weights)
    if total <= 0:
        raise UsageError(
            "the batch of this step has no target token, so there is nothing to learn: "
            "every label is masked; check the labels, or remove such samples"
        )
    return [MicroBatch(piece, weight / total) for piece, weight in zip(pieces, weights, strict=True) if weight]


Choose = Callable[[list[MicroBatch]], list[MicroBatch]]
"""Selects which micro-batches of a step run."""


def prepare_steps(workload: Workload, steps: int, choose: Choose = list) -> list[list[MicroBatch]]:
    """The micro-batches that `choose` selects for each step, on the host.

    Every step takes the first batch, so the second step differs from the first only in the optimizer state, which
    exists by then.

    Raises:
        UsageError: the workload has no batch, `steps` is below 1, or the batch cannot be split as the plan says.
    """
    if steps < 1:
        raise UsageError(
            f"cannot run {steps} steps: choose at least 1, or at least 2 to see a step with optimizer state"
        )
    if not len(workload.batches):
        raise UsageError(f'"{workload.name}" has no batch to train on')
    return [choose(micro_batches(workload, workload.batches[0])) for _ in range(steps)]
