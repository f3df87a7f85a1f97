"""The steps of a training run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from memscope.errors import MemscopeError
from memscope.targets.training.checkpoints import newest_checkpoint, save_checkpoint
from memscope.targets.training.data_order import samples_of_step
from memscope.targets.training.metrics import Metric, Stepped
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.session import Session, room_to_train
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import run_step

__all__ = ["Watch", "told_how_to_go_on", "train"]


class Watch(Protocol):
    """Observer of a run: receives the metrics and decides whether to stop."""

    def metric(self, metric: Metric) -> None:
        """Called after every step and every evaluation of the held-out samples."""

    def stopped(self) -> bool:
        """Whether to stop the run after this step, with a checkpoint."""


def train(session: Session, folder: RunFolder, watch: Watch) -> bool:
    """Carry out the remaining steps, with a checkpoint every `save_every` steps and after the last one.

    Returns:
        Whether all steps are done; False if the watch stopped the run.

    Raises:
        MemscopeError: a loss is not finite, or a checkpoint cannot be written; the message says how to resume.
        OutOfDeviceMemory: a step does not fit on the device.
    """
    if session.job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    recipe, stopped = session.job.recipe, False
    with told_how_to_go_on(folder), room_to_train(session.job):
        while session.done < session.steps and not stopped:
            watch.metric(_step(session))
            stopped = watch.stopped()
            if stopped or session.done == session.steps or session.done % recipe.save_every == 0:
                _save(session, folder)
    return session.done >= session.steps


def _step(session: Session) -> Stepped:
    job, training, began = session.job, session.training, time.perf_counter()
    factor = session.job.recipe.rate_factor(session.done, session.steps)
    for group, rate in zip(training.optimizer.param_groups, session.rates, strict=True):
        group["lr"] = rate * factor
    size = job.samples_per_step
    samples = samples_of_step(session.samples, session.done, size, job.config.seed)
    scale = training.scaler.get_scale() if training.scaler else None
    loss = run_step(training, micro_batches(training.workload, samples)).item()  # waits for the device, once per step
    if not math.isfinite(loss):
        raise MemscopeError(f"step {session.done + 1}: the loss is {loss}. {_REMEDIES}")
    session.done += 1
    seconds, tokens = time.perf_counter() - began, sum(map(session.tokens_of, samples))
    return Stepped(
        step=session.done,
        epoch=session.done * size / len(session.samples),
        loss=loss,
        lr=session.rates[0] * factor,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if session.job.device == "cuda" else None,
        grad_scale=scale,
        # torch/amp/grad_scaler.py, `update`: the scale falls after, and only after, a step with overflow.
        skipped=training.scaler.get_scale() < scale if training.scaler and scale is not None else None,
    )


_REMEDIES = (
    "A lower --lr, a longer --warmup or a smaller --clip-grad-norm may prevent this; "
    "with amp, so may dtype=bf16, which has the range of float32"
)


def _save(session: Session, folder: RunFolder) -> None:
    trained = [p for p in session.training.workload.model.parameters() if p.requires_grad]
    if not all(torch.stack([torch.isfinite(parameter).all() for parameter in trained]).tolist()):
        raise MemscopeError(
            f"step {session.done}: the update produced weights that are not finite, so nothing was saved. {_REMEDIES}"
        )
    about = {"settings": session.job.settings, "origin": session.origin}
    save_checkpoint(folder.checkpoints, session.training, session.done, about, keep=session.job.recipe.keep)


@contextmanager
def told_how_to_go_on(folder: RunFolder) -> Iterator[None]:
    """Add the last checkpoint, and how to resume from it, to error messages."""
    try:
        yield
    except MemscopeError as error:
        last = newest_checkpoint(folder.checkpoints)
        hint = f"The last checkpoint is {last}; --resume {folder.path} resumes from it" if last else "No checkpoint yet"
        error.args = (f"{error}\n{hint}",)
        raise
