"""Resuming a run in its folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from memscope.errors import UsageError
from memscope.targets.training.checkpoints import newest_checkpoint
from memscope.targets.training.job import TrainingJob
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.session import Session, continue_from

__all__ = ["resumed"]

J = TypeVar("J", bound=TrainingJob)


def resumed(
    folder: RunFolder, kind: type[J], job_of: Callable[[dict[str, str]], J], prepare: Callable[[J], Session]
) -> Session:
    """Continue the run in a folder from its newest checkpoint, and write down the settings that changed.

    Args:
        folder: the folder of the run.
        kind: the class of its job.
        job_of: the job to carry out, from the settings of the run.
        prepare: begins a session.

    Raises:
        UsageError: the folder holds no run, a finished one, one without a checkpoint, or one that differs in more than
            may change when a run is resumed.
    """
    settings = folder.read_settings()
    there = kind.of(settings)
    if folder.finished:
        raise UsageError(f"{folder.path}: this run is finished, so there is nothing to resume: see {folder.finished}")
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise UsageError(f"{folder.path}: no checkpoint was written yet: start again with -o {folder.path} -f")
    job = job_of(settings)
    refused, changed = there.differences(job)
    if refused:
        raise UsageError(
            f"{folder.path} is another run: {'; '.join(refused)}. To resume it, leave out all other options"
        )
    session = prepare(job)
    continue_from(session, checkpoint)
    folder.note(job.settings)
    for difference in changed:
        click.echo(f"changed from step {session.done + 1}: {difference}", err=True)
    return session
