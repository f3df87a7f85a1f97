"""Gradient accumulation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.statistics import keeps_statistics
from memscope.workload.description import Workload
from memscope.workload.split import sample_counts

__all__ = ["GradientAccumulation"]

_MOST_CANDIDATE_STEPS = 256
"""A simulation runs every micro-batch. More of them would save less than a 256th of the activations of the batch."""


class GradientAccumulation(Strategy):
    """Split a step's batch into micro-batches and accumulate their gradients. The effective batch does not change."""

    name = "ga"
    stage = Stage.STEP
    exact = True
    trains = "how gradients accumulate"
    changes = "the statistics of batch norm"
    provides = frozenset({"accumulation"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "↓",
        "gradient": "–",
        "optimizer_state": "–",
        "computation": "–",
    }

    @dataclass(frozen=True)
    class Config:
        """The number of micro-batches."""

        steps: int = 8
        """Micro-batches per step; must divide the number of samples in the step's batch."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """Every divisor of the number of samples in a step up to 256, except the present number of micro-batches.

        Empty if the samples cannot be counted. The effective batch does not change: more micro-batches need less
        memory, fewer are faster.
        """
        return [cls.Config(steps) for steps in _numbers(workload) if steps <= _MOST_CANDIDATE_STEPS]

    @classmethod
    def left_out(cls, workload: Workload) -> Sequence[Config]:
        """The larger divisors."""
        return [cls.Config(steps) for steps in _numbers(workload) if steps > _MOST_CANDIDATE_STEPS]

    def check(self, workload: Workload) -> list[Problem]:
        """Report a batch that cannot be split into this number of micro-batches."""
        if self.config.steps < 1:
            return [Problem(f"steps={self.config.steps} is not a number of micro-batches", "choose at least 1")]
        if not len(workload.batches):  # an error when the workload runs, with or without this strategy
            return []
        try:
            workload.split(workload.batches[0], self.config.steps)
        except UsageError as error:
            return [Problem(f"steps={self.config.steps}", str(error))]
        return []

    def is_exact(self, workload: Workload) -> bool:
        """Whether the model has no batch norm: its statistics would be those of the smaller batches."""
        return self.config.steps == workload.plan.micro_batches or not keeps_statistics(workload.model)

    def baseline(self, workload: Workload) -> None:
        """The same effective batch in one micro-batch."""
        workload.plan = dataclasses.replace(workload.plan, micro_batches=1)

    def apply(self, workload: Workload) -> None:
        """Set the number of micro-batches."""
        workload.plan = dataclasses.replace(workload.plan, micro_batches=self.config.steps)


def _numbers(workload: Workload) -> list[int]:
    """The other numbers of equal micro-batches that a step can have, smallest first."""
    samples = max(sample_counts(workload.batches[0]), default=0) if len(workload.batches) else 0
    small = [number for number in range(1, math.isqrt(samples) + 1) if samples % number == 0]
    return sorted({*small, *(samples // number for number in small)} - {workload.plan.micro_batches})
