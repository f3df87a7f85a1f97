"""Low-rank adaptation of a model with 4-bit weights (Dettmers et al., "QLoRA", 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal

import torch

from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.lora import LoRA
from memscope.strategies.quantized.checks import missing_library, note_stand_in, problems_of
from memscope.strategies.quantized.layers import Bits4, full_precision_in_float32, quantize
from memscope.strategies.quantized.targets import quantizable
from memscope.workload.description import Workload

__all__ = ["QLoRA"]

_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class QLoRA(Strategy):
    """Keep the weights of all linear layers but the output head in 4 bits, frozen, and train low-rank updates of some.

    The layers are those of bitsandbytes. Norms, embedding and head stay in float32, frozen, as PEFT's
    `prepare_model_for_kbit_training` leaves them. The updates are those of `lora`.
    """

    name = "qlora"
    stage = Stage.ADAPT
    exact = False
    changes = "what is trained, and the precision of the frozen weights"
    provides = frozenset({"adapters", "quantized weights"})
    conflicts = frozenset({"lora", "bf16", "quantized weights"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "↓",
        "activation": "–",
        "gradient": "↓",
        "optimizer_state": "↓",
    }

    @dataclass(frozen=True)
    class Config(LoRA.Config):
        """How the weights are quantized, and the settings of `lora`."""

        bits: Literal["4"] = "4"
        """Bits of a weight; for 8, use int8 with lora."""
        type: Literal["nf4", "fp4"] = "nf4"
        """The 4-bit type: nf4, the quantiles of a normal distribution, or fp4, a floating-point number."""
        double: bool = True
        """Quantize the scale of each block of 64 weights to 8 bits, too."""
        compute: Literal["bf16", "fp16", "fp32"] = "bf16"
        """The precision to which a weight is unpacked, and in which it is multiplied."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """Those of `lora`."""
        return [cls.Config(**asdict(config)) for config in LoRA.candidates(workload)]

    def check(self, workload: Workload) -> list[Problem]:
        """Report weights that cannot be quantized, and the problems of `lora`."""
        problems = problems_of(workload)
        return problems or [*missing_library(workload), *self._lora.check(workload)]

    def apply(self, workload: Workload) -> None:
        """Quantize the linear layers, then adapt some of them."""
        config, lora = self.config, self._lora
        compute = _COMPUTE[config.compute]
        quantize(workload.model, quantizable(workload.model), Bits4(config.type, config.double, compute, dtype=compute))
        full_precision_in_float32(workload.model)
        note_stand_in(workload)
        lora.apply(workload)
        self.chosen = lora.chosen

    @property
    def _lora(self) -> LoRA:
        return LoRA(LoRA.Config(**{field.name: getattr(self.config, field.name) for field in fields(LoRA.Config)}))
