"""Gradient accumulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.workload.description import Workload
from memscope.workload.split import sample_counts

__all__ = ["GradientAccumulation"]


class GradientAccumulation(Strategy):
    """Split a step's batch into micro-batches and add up their gradients. The effective batch stays what it was."""

    name = "ga"
    stage = Stage.STEP
    exact = True
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
        """How many pieces."""

        steps: int = 8
        """Micro-batches a step; the step's batch must divide into them."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """Every other number of micro-batches that the samples of a step divide into; none where they cannot be found.

        The effective batch stays: more micro-batches are smaller ones, fewer are faster.
        """
        samples = max(sample_counts(workload.batches[0]), default=0) if len(workload.batches) else 0
        now = workload.plan.micro_batches
        return [cls.Config(steps) for steps in range(1, samples + 1) if samples % steps == 0 and steps != now]

    def check(self, workload: Workload) -> list[Problem]:
        """A step's batch that does not divide into the micro-batches."""
        if self.config.steps < 1:
            return [Problem(f"steps={self.config.steps} is no number of micro-batches", "choose at least 1")]
        if not len(workload.batches):  # refused when the workload is run, with this strategy or without
            return []
        try:
            workload.split(workload.batches[0], self.config.steps)
        except UsageError as error:
            return [Problem(f"steps={self.config.steps}", str(error))]
        return []

    def baseline(self, workload: Workload) -> None:
        """The same effective batch in one go."""
        workload.plan = dataclasses.replace(workload.plan, micro_batches=1)

    def apply(self, workload: Workload) -> None:
        """Set the number of micro-batches."""
        workload.plan = dataclasses.replace(workload.plan, micro_batches=self.config.steps)
