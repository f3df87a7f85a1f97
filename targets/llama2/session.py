"""A fine-tuning run in progress, prepared from a job or continued from a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.targets.llama2.alpaca import Sample
from memscope.targets.llama2.checkpoints import load_checkpoint, restore
from memscope.targets.llama2.device import require_device, room_on_device
from memscope.targets.llama2.job import Job
from memscope.targets.llama2.target import SHIPPED_TOKENIZER, build_on, read_samples
from memscope.targets.llama2.tokenizer import Tokenizer
from memscope.workload.batch import map_tensors
from memscope.workload.step import Training

__all__ = ["Session", "continue_from", "prepare", "room_to_train"]


@dataclass
class Session:
    """A job in progress: the training, its samples, and the steps done."""

    job: Job
    training: Training
    samples: list[Sample]
    held_out: list[Sample]
    steps: int
    """Total number of optimizer steps."""
    rates: list[float]
    """Full learning rate of each parameter group."""
    origin: dict[str, str]
    """SHA-256 of the samples and of the frozen weights: a checkpoint is valid only for these."""
    done: int = 0
    """Optimizer steps done."""

    def shortfalls(self) -> Iterator[str]:
        """What the data has less of than the job asks for, as sentences."""
        found, asked = len(self.samples), self.job.config.samples
        held_out, to_hold_out = len(self.held_out), self.job.recipe.held_out
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
    origin = {"data": _fingerprint_of_samples(rows), "frozen weights": _fingerprint_of_frozen(workload.model)}
    with room_to_train():
        workload.model.to(job.device)
    move = partial(torch.Tensor.to, device=job.device, non_blocking=True)
    training = Training.start(workload, job.device, partial(map_tensors, move))
    steps = recipe.steps(len(samples), config.micro_batch * config.accumulation)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    return Session(job, training, samples, held_out, steps, rates, origin)


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


def _fingerprint_of_samples(samples: list[Sample]) -> str:
    return hashlib.sha256(repr([(sample.prompt_tokens, sample.tokens) for sample in samples]).encode()).hexdigest()


_VALUES = 1024
"""Values per weight in the fingerprint: training changes all values, so the first ones suffice and are fast to read."""


def _fingerprint_of_frozen(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            first = parameter.detach().flatten()[:_VALUES].cpu().contiguous()
            digest.update(f"{name} {first.dtype} {tuple(parameter.shape)}".encode())
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def continue_from(session: Session, path: Path) -> None:
    """Continue from a checkpoint.

    Raises:
        UsageError: the checkpoint is damaged, or of a run that differs in more than may change when a run is resumed;
            the message names every difference.
    """
    state = load_checkpoint(path)
    differing, _ = Job.of(state["settings"]).differences(session.job)
    if not differing:
        now, then = session.origin, state["origin"]
        differing = [f"the {what} have changed since the run began" for what in now if then[what] != now[what]]
    if differing:
        raise UsageError(f"checkpoint {path} is of another run: {'; '.join(differing)}")
    restore(session.training, state, path)
    session.done = state["step"]


def room_to_train() -> AbstractContextManager[None]:
    """Turn an out-of-memory error of the GPU into a message with a remedy."""
    return room_on_device("To make it fit, see: memscope advise targets/llama2 --budget …, with the same settings")
