"""Keep a part of the step's memory on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.offload.activations import Offloaded
from memscope.workload.description import Workload

__all__ = ["Offload"]


class Offload(Strategy):
    """Keep activations on the host while the GPU does not need them."""

    name = "offload"
    stage = Stage.STEP
    exact = True

    @dataclass(frozen=True)
    class Config:
        """What is on the host; activations, if nothing is named."""

        activations: bool = False
        """Copy everything that autograd saves for the backward pass, that of the loss included, to pinned memory, and
        back when it is needed."""

    def check(self, workload: Workload) -> list[Problem]:
        return []

    def apply(self, workload: Workload) -> None:
        workload.loss = Offloaded(workload.model, workload.loss)
