"""The published programs of the scoreboard that fine-tune LLaMA2-7B in Meta's code, as a target.

They keep `logits` and `shift_logits` in local variables, so both live until the next forward pass has made new ones.
The order of their samples is not known: every micro-batch is the longest sample.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from memscope import Workload
from memscope.targets.llama2.alpaca import Batch, Sample
from memscope.targets.llama2.target import PRESETS as LLAMA2
from memscope.targets.llama2.target import build_on

__all__ = ["Config", "build"]


@dataclass(frozen=True)
class MetaLlama2Program:
    """A program: LoRA is applied as a strategy."""

    bias: tuple[str, ...] | None = None
    """Layers that also have a bias, frozen and zero, joined by +; none: no layer."""
    accumulation: int = 1
    """Micro-batches per optimizer step, of one sample each."""
    seq_len: int = 405
    """Tokens of the longest sample."""


Config: TypeAlias = MetaLlama2Program
"""The name by which memscope finds the settings of a target."""


def build(config: Config) -> Workload:
    """The workload of the program."""
    settings = dataclasses.replace(LLAMA2["7b"], max_seq_len=512, accumulation=config.accumulation)
    workload = build_on([Sample((1,) * config.seq_len, 0)] * config.accumulation, settings)
    for name, module in workload.model.named_modules():
        if name.rpartition(".")[2] in (config.bias or ()):
            assert isinstance(module, nn.Linear)
            module.bias = nn.Parameter(torch.zeros(module.out_features), requires_grad=False)
    return dataclasses.replace(workload, loss=_PublishedLoop())


class _PublishedLoop:
    """The loss, with the local variables of the training loop."""

    def __init__(self) -> None:
        self._variables: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        variables = self._variables
        variables["logits"] = logits = model(batch["tokens"])
        variables["shift_logits"] = shifted = logits[..., :-1, :].contiguous()
        labels = batch["labels"][..., 1:].contiguous()
        return nn.functional.cross_entropy(shifted.view(-1, 32_000), labels.view(-1), ignore_index=-100)
