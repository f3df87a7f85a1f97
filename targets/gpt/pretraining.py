"""A pre-training run: its job, its beginning, its evaluations and its result."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from memscope.errors import MemscopeError, UsageError
from memscope.strategies import Plan
from memscope.targets.gpt.config import Config
from memscope.targets.gpt.target import build_on
from memscope.targets.gpt.text import read_windows
from memscope.targets.training.device import require_device
from memscope.targets.training.files import new_folder
from memscope.targets.training.job import TrainingJob
from memscope.targets.training.metrics import Evaluated
from memscope.targets.training.recipe import Recipe
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.session import Session, begin, room_to_train
from memscope.targets.training.train import Watch, told_how_to_go_on
from memscope.workload.step import Training

__all__ = ["PretrainingJob", "measure", "prepare_pretraining", "save_weights_of"]


@dataclass(frozen=True)
class PretrainingJob(TrainingJob):
    """All settings of a pre-training run."""

    TARGET: ClassVar[str] = "gpt"
    CONFIG: ClassVar[type] = Config
    RECIPE: ClassVar[type[Recipe]] = Recipe


def prepare_pretraining(job: PretrainingJob) -> Session:
    """Read the text, build the model, apply the strategies on the host, and move it to the device.

    Raises:
        UsageError: text, tokenizer or plan cannot be used, or all of the text would be held out.
        OutOfDeviceMemory: the weights alone do not fit on the device.
    """
    require_device(job.device)
    config, recipe = job.config, job.recipe
    windows = read_windows(config)
    count = len(windows) - recipe.held_out if config.samples is None else config.samples
    if not 1 <= count <= len(windows) - recipe.held_out:
        raise UsageError(
            f"data {config.data}: the text has {len(windows)} samples of {config.seq_len} tokens; "
            f"{recipe.held_out} are held out, so {max(len(windows) - recipe.held_out, 0)} are left to train on: use a "
            "longer text, fewer --samples, or a smaller --held-out"
        )
    samples, held_out = windows[:count], windows[count : count + recipe.held_out]
    plan = Plan.parse(job.plan)
    with torch.device("meta"):
        plan.check(build_on(samples, config))
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    workload = build_on(samples, config)
    workload.plan = dataclasses.replace(workload.plan, clip_grad_norm=recipe.clip_grad_norm)
    plan.apply(workload)
    data = windows[: count + recipe.held_out].contiguous().numpy().tobytes()
    return begin(job, workload, list(samples), list(held_out), data=data, tokens_of=lambda _: config.seq_len)


def measure(session: Session, watch: Watch) -> None:
    """Measure perplexity and token accuracy of the held-out samples, if there are any.

    Raises:
        MemscopeError: the loss of the samples is not finite.
        OutOfDeviceMemory: the samples do not fit on the device.
    """
    if session.held_out:
        with room_to_train(session.job):
            perplexity, accuracy = _measured(session.training, session.held_out)
        watch.metric(Evaluated(session.done, perplexity, accuracy))


@torch.no_grad()
def _measured(training: Training, samples: Sequence[Tensor]) -> tuple[float, float]:
    """Perplexity, and the share of tokens to which the model gives the largest probability."""
    workload = training.workload
    dtype, loss, correct, tokens = workload.plan.autocast, 0.0, 0, 0
    workload.model.eval()
    try:
        for sample in samples:
            window = training.to_device(sample.unsqueeze(0))
            with torch.autocast(training.device_type, dtype=dtype) if dtype else contextlib.nullcontext():
                logits = workload.model(window[:, :-1])[0]
            labels = window[0, 1:]
            loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()
            correct += int((logits.argmax(-1) == labels).sum())
            tokens += len(labels)
    finally:
        workload.model.train()
    if not math.isfinite(loss):
        raise MemscopeError(
            f"the loss of the {len(samples)} held-out samples is {loss}: numbers out of range; with amp, try "
            "dtype=bf16; --held-out 0 skips the evaluation"
        )
    return math.exp(loss / tokens), correct / tokens


def save_weights_of(session: Session, folder: RunFolder) -> Path:
    """Save the weights as `model.safetensors`.

    Raises:
        MemscopeError: the disk is full or cannot be written; the message says how to resume.
    """
    _, weights = folder.results
    with told_how_to_go_on(folder), new_folder(weights) as unfinished:
        named = session.training.workload.model.state_dict()
        save_file({name: value.contiguous() for name, value in named.items()}, unfinished / "model.safetensors")
    return weights
