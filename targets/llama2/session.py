"""A fine-tuning run, prepared from its job."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import torch

from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.targets.llama2.job import Job
from memscope.targets.llama2.target import SHIPPED_TOKENIZER, build_on, read_samples
from memscope.targets.training.device import require_device
from memscope.targets.training.session import Session, begin
from memscope.targets.training.tokenizer import Tokenizer

__all__ = ["prepare", "shortfalls"]


def prepare(job: Job) -> Session:
    """Read the data, build the model, apply the strategies on the host, and move it to the device.

    Raises:
        UsageError: data, weights or plan cannot be used. All are checked before weights are read.
        OutOfDeviceMemory: the weights alone do not fit on the device.
    """
    require_device(job.device)
    config, recipe = job.config, job.recipe
    if config.weights is not None:  # random weights can be trained on any token ids that have a row
        Tokenizer.load(config.tokenizer or SHIPPED_TOKENIZER, config.vocab_size)
    rows = read_samples(dataclasses.replace(config, samples=config.samples + recipe.held_out))
    samples, held_out = rows[: config.samples], rows[config.samples :]
    plan = Plan.parse(job.plan)
    _require_savable(plan)
    with torch.device("meta"):
        plan.check(build_on(samples, config))
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    workload = build_on(samples, config)
    workload.plan = dataclasses.replace(workload.plan, clip_grad_norm=recipe.clip_grad_norm)
    plan.apply(workload)
    return begin(
        job,
        workload,
        samples,
        held_out,
        data=repr([(sample.prompt_tokens, sample.tokens) for sample in rows]).encode(),
        tokens_of=lambda sample: len(sample.tokens),
    )


def _require_savable(plan: Plan) -> None:
    """Refuse adapters that can be trained here, but not saved.

    Raises:
        UsageError: the plan has an adapter other than plain LoRA.
    """
    for strategy in plan.strategies:
        config = strategy.config
        plain = strategy.name != "lora" or not (config.dora or config.pissa or config.olora)
        if strategy.name == "peft" or not plain:
            raise UsageError(
                f"{strategy.spec}: fine-tuning LLaMA2 saves all weights or plain LoRA updates: use lora without dora, "
                "pissa and olora, or another program"
            )


def shortfalls(session: Session) -> Iterator[str]:
    """What the data has less of than the job asks for, as sentences."""
    found, asked = len(session.samples), session.job.config.samples
    held_out, to_hold_out = len(session.held_out), session.job.recipe.held_out
    if found < asked:
        yield f"the data has {found} rows, fewer than samples={asked}: all of them are trained on"
    if to_hold_out and not held_out:
        yield (
            f"the data has no rows after these {found} samples to hold out, so perplexity is not measured; use "
            "fewer --samples to leave some"
        )
    elif held_out < to_hold_out:
        yield (
            f"the data has {held_out} rows after these {found} samples, fewer than held_out={to_hold_out}: "
            f"perplexity is that of {held_out}"
        )
