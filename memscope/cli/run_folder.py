"""The folder that a profile writes to."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from memscope.command.target_words import RUNS, short_name
from memscope.errors import UsageError
from memscope.interrupts import interrupts_held, undone

__all__ = ["run_folder", "scratch_in"]


@contextlib.contextmanager
def run_folder(output: Path | None, target: str) -> Iterator[Path]:
    """Create the folder of a profile; remove it again if it is still empty at the end.

    Args:
        output: the folder that the user names; None: a new one in `memscope-runs`, which no other profile uses, not
            even one that starts in the same second.
        target: the target, which names a new folder.

    Raises:
        UsageError: the folder cannot be created or written to.
    """
    folder = output or RUNS / f"{short_name(target)}-{time.strftime('%Y%m%d-%H%M%S')}"
    if output and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: -o takes a folder, for example -o runs/first")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as scopes:
        with interrupts_held():
            folder = _created(folder) if output else _claimed(folder)
            scopes.enter_context(undone(partial(_remove_empty, [folder, *new])))
        yield folder


def _created(folder: Path) -> Path:
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder}: the folder is not writable: choose another one with -o")
    return folder


def _claimed(folder: Path) -> Path:
    """A folder that did not exist before: `folder`, or the same name with a number."""
    names = itertools.chain([folder.name], (f"{folder.name}-{number}" for number in itertools.count(2)))
    with _explained(folder):
        folder.parent.mkdir(exist_ok=True)
        for path in map(folder.with_name, names):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    raise AssertionError("unreachable")  # there is no last number


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{folder}: the folder cannot be created ({error.strerror}): choose another one with -o"
        ) from error


def _remove_empty(folders: list[Path]) -> None:
    for path in dict.fromkeys(folders):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """Return a hidden folder of this process's own for files that are moved into `folder` when they are whole.

    Raises:
        UsageError: it cannot be created.
    """
    scratch = folder / f".part-{secrets.token_hex(4)}"
    with undone(partial(shutil.rmtree, scratch, ignore_errors=True)):
        with _explained(scratch):
            scratch.mkdir()
        yield scratch
