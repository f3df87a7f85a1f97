"""Frozen weights in 8 bits (Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.quantized.checks import missing_library, note_stand_in, problems_of
from memscope.strategies.quantized.layers import Bits8, full_precision_in_float32, quantize
from memscope.strategies.quantized.targets import quantizable
from memscope.workload.description import Workload

__all__ = ["Int8"]


class Int8(Strategy):
    """Keep the weights of all linear layers but the output head in 8 bits, frozen; with adapters, which are trained.

    The layers are those of bitsandbytes. Norms, embedding and head stay in float32, frozen, as PEFT's
    `prepare_model_for_kbit_training` leaves them.
    """

    name = "int8"
    stage = Stage.LOAD
    exact = False
    changes = "the precision of the frozen weights"
    requires = frozenset({"adapters"})
    provides = frozenset({"quantized weights"})
    conflicts = frozenset({"bf16", "reading of weights"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "↓",
        "activation": "–",
        "gradient": "–",
        "optimizer_state": "–",
    }

    @dataclass(frozen=True)
    class Config:
        """How inputs with large values are multiplied."""

        threshold: float = 6.0
        """Columns of a layer's input with a value of at least this magnitude are multiplied in 16 bits; 0: none are."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """The default threshold."""
        return [cls.Config()] if quantizable(workload.model) else []

    def check(self, workload: Workload) -> list[Problem]:
        """Report weights that cannot be quantized."""
        problems = problems_of(workload)
        if self.config.threshold < 0:
            what = f"threshold={self.config.threshold} is not a magnitude"
            problems.append(Problem(what, "choose 0 or a larger number"))
        return problems or missing_library(workload)

    def apply(self, workload: Workload) -> None:
        """Quantize the linear layers."""
        quantize(workload.model, quantizable(workload.model), Bits8(self.config.threshold))
        full_precision_in_float32(workload.model)
        note_stand_in(workload)
