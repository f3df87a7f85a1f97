"""Pre-training from nothing: the workload of `memscope profile targets/gpt`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.targets.gpt.config import PRESETS, Config
from memscope.targets.gpt.experts import RoutedExperts
from memscope.targets.gpt.model import Decoder
from memscope.targets.gpt.text import made_up, read_windows
from memscope.workload.description import StepPlan, Workload

__all__ = ["PRESETS", "Config", "build", "build_on"]

_BALANCE = 0.01
"""Weight of the experts' balance in the loss: Fedus et al., arXiv 2101.03961, section 2.2."""


def build(config: Config) -> Workload:
    """Build the workload: model, windows of the text or made-up token ids, and AdamW.

    Raises:
        UsageError: text or tokenizer cannot be used or do not fit the model.
    """
    needed = config.micro_batch * config.accumulation
    return build_on(made_up(config, needed) if config.data is None else read_windows(config), config)


def build_on(windows: Tensor, config: Config) -> Workload:
    """Build the workload on windows of token ids `[samples, seq_len + 1]`, in steps of `micro_batch * accumulation`."""

    def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        given = list(parameters)
        groups = [[p for p in given if (p.ndim > 1) == decays] for decays in (True, False)]
        settings = [
            {"params": group, "weight_decay": decay}
            for group, decay in zip(groups, (config.weight_decay, 0.0), strict=True)
            if group
        ]
        return torch.optim.AdamW(settings, lr=config.lr, betas=(0.9, 0.95))

    size = config.micro_batch * config.accumulation
    places = torch.arange(-(-len(windows) // size) * size).remainder(len(windows)).view(-1, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Decoder(config)
    return Workload(
        model=model,
        batches=[windows[of_step] for of_step in places],
        loss=loss,
        optimizer_factory=adamw,
        plan=StepPlan(micro_batches=config.accumulation),
        name="gpt",
        split=split,
        settings=dataclasses.asdict(config),
        positions=config.seq_len,
    )


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, over all tokens, and the balance of experts that tokens choose."""
    logits = model(windows[:, :-1])
    total = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    for module in model.modules():
        if isinstance(module, RoutedExperts) and module.balance is not None:
            total = total + _BALANCE * module.balance
    return total


def split(samples: list[Tensor] | Tensor, parts: int) -> list[Tensor]:
    """Split the samples of one step, a list or one tensor, into micro-batches."""
    return list((samples if isinstance(samples, Tensor) else torch.stack(samples)).chunk(parts))
