"""The micro-batches of a step, and those of every step of a run."""

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
    """Split one step's batch as the plan says; each piece is weighted so that accumulation equals the whole batch.

    A piece without any weight is left out: its mean loss would be 0 / 0.

    Raises:
        UsageError: when the batch cannot be split, or weighs nothing as a whole.
    """
    pieces = workload.split(batch, workload.plan.micro_batches)
    weights = [workload.weight(piece) for piece in pieces]
    total = sum(weights)
    if total <= 0:
        raise UsageError(
            "the batch of this step has no target token: nothing to learn from; "
            "check the labels (every one is masked) or leave such samples out"
        )
    return [MicroBatch(piece, weight / total) for piece, weight in zip(pieces, weights, strict=True) if weight]


Choose = Callable[[list[MicroBatch]], list[MicroBatch]]
"""Selects the micro-batches of a step to run."""


def prepare_steps(workload: Workload, steps: int, choose: Choose = list) -> list[list[MicroBatch]]:
    """The micro-batches of each step, on the host: those that `choose` leaves of them.

    Every step takes the first batch, so that the second step equals the first but for the optimizer state that is there
    by then.

    Raises:
        UsageError: when there is no data, no step, or a batch cannot be split as the plan says.
    """
    if steps < 1:
        raise UsageError(
            f"{steps} steps were asked for: at least one is needed, and two to see a step with optimizer state"
        )
    if not len(workload.batches):
        raise UsageError(f'"{workload.name}" has no batch to train on')
    return [choose(micro_batches(workload, workload.batches[0])) for _ in range(steps)]
