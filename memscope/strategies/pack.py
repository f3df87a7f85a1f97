"""The samples of a micro-batch in one row, in place of rows that are padded to the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.statistics import keeps_statistics
from memscope.workload.batch import tensors_in
from memscope.workload.description import Workload

__all__ = ["Pack"]


class Pack(Strategy):
    """Join the samples of each micro-batch to one row without padding; each sample attends to itself alone.

    The samples, and so the tokens with a label, stay the same: memory and time are compared at equal tokens.
    """

    name = "pack"
    stage = Stage.STEP
    exact = True
    changes = "the statistics of batch norm, which no longer see padding"
    provides = frozenset({"packing"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "↓",
        "gradient": "–",
        "optimizer_state": "–",
        "computation": "↓",
    }

    @dataclass(frozen=True)
    class Config:
        """No settings."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """None where the micro-batches of the workload have no padding."""
        if workload.packed is None or not len(workload.batches):
            return []
        return [cls.Config()] if _has_padding(workload, workload.plan.micro_batches) else []

    def check(self, workload: Workload) -> list[Problem]:
        """Report a workload whose samples cannot be packed, or have one length."""
        if workload.packed is None:
            what = f'"{workload.name}" has no packed batches'
            return [Problem(what, "remove this strategy, or give the Workload a function `packed`")]
        # Another strategy may change the number of micro-batches: one has the most padding.
        if len(workload.batches) and not _has_padding(workload, 1):
            return [Problem(_NO_PADDING, _WHAT_THEN)]
        return []

    def is_exact(self, workload: Workload) -> bool:
        """Whether the model has no batch norm, which padding takes part in."""
        return not keeps_statistics(workload.model)

    def apply(self, workload: Workload) -> None:
        """Split the batches of the steps into packed micro-batches.

        Raises:
            UsageError: the micro-batches, whose number the plan has settled by now, have no padding.
        """
        assert workload.packed is not None, "check() says so"
        if len(workload.batches) and not _has_padding(workload, workload.plan.micro_batches):
            raise UsageError(f"pack: {_NO_PADDING}: {_WHAT_THEN}")
        workload.split = workload.packed


def _has_padding(workload: Workload, parts: int) -> bool:
    assert workload.packed is not None
    try:
        padded = workload.split(workload.batches[0], parts)
        return _tokens(workload.packed(workload.batches[0], parts)) < _tokens(padded)
    except UsageError:  # an error when the workload runs, with or without this strategy
        return True


def _tokens(pieces: Sequence[Any]) -> int:
    """Elements of the largest tensor of each micro-batch, together."""
    return sum(max((tensor.numel() for tensor in tensors_in(piece)), default=0) for piece in pieces)


_NO_PADDING = "the batch has no padding: every micro-batch has one sample, or samples of one length"
_WHAT_THEN = "remove this strategy, or put samples of different lengths into a micro-batch"
