"""A training run in progress, begun or continued from a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memscope.errors import UsageError
from memscope.targets.training.checkpoints import load_checkpoint, restore
from memscope.targets.training.device import room_on_device
from memscope.targets.training.job import TrainingJob
from memscope.workload.batch import map_tensors
from memscope.workload.description import Workload
from memscope.workload.step import Training

__all__ = ["Session", "begin", "continue_from", "room_to_train"]


@dataclass
class Session:
    """A job in progress: the training, its samples, and the steps done."""

    job: TrainingJob
    training: Training
    samples: Sequence[Any]
    held_out: Sequence[Any]
    steps: int
    """Total number of optimizer steps."""
    rates: list[float]
    """Full learning rate of each parameter group."""
    origin: dict[str, str]
    """SHA-256 of the samples and of the frozen weights: a checkpoint is valid only for these."""
    tokens_of: Callable[[Any], int]
    """Number of tokens of a sample."""
    done: int = 0
    """Optimizer steps done."""


def begin(
    job: TrainingJob,
    workload: Workload,
    samples: Sequence[Any],
    held_out: Sequence[Any],
    *,
    data: bytes,
    tokens_of: Callable[[Any], int],
) -> Session:
    """Move a workload whose strategies have been applied to the device of its job, and build the optimizer.

    Args:
        job: the settings of the run.
        workload: the workload, on the host.
        samples: the samples to train on.
        held_out: the samples to measure.
        data: all samples as bytes, for the fingerprint of the data.
        tokens_of: number of tokens of a sample.

    Raises:
        OutOfDeviceMemory: the weights alone do not fit on the device.
    """
    origin = {"data": hashlib.sha256(data).hexdigest(), "frozen weights": _fingerprint_of_frozen(workload.model)}
    with room_to_train(job):
        workload.model.to(job.device)
    move = partial(torch.Tensor.to, device=job.device, non_blocking=True)
    training = Training.start(workload, job.device, partial(map_tensors, move))
    steps = job.recipe.steps(len(samples), job.samples_per_step)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    return Session(job, training, samples, held_out, steps, rates, origin, tokens_of)


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
    differing, _ = session.job.of(state["settings"]).differences(session.job)
    if not differing:
        now, then = session.origin, state["origin"]
        differing = [f"the {what} have changed since the run began" for what in now if then[what] != now[what]]
    if differing:
        raise UsageError(f"checkpoint {path} is of another run: {'; '.join(differing)}")
    restore(session.training, state, path)
    session.done = state["step"]


def room_to_train(job: TrainingJob) -> AbstractContextManager[None]:
    """Turn an out-of-memory error of the GPU into a message with a remedy."""
    return room_on_device(
        f"To make it fit, see: memscope advise targets/{job.TARGET} --budget …, with the same settings"
    )
