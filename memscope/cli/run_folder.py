"""The folder that a profile writes to."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from memscope.command.target_words import RUNS
from memscope.errors import UsageError

__all__ = ["run_folder", "scratch_in"]


@contextlib.contextmanager
def run_folder(output: Path | None, target: str) -> Iterator[Path]:
    """Create the folder of a profile; remove it again if it is still empty at the end.

    Args:
        output: the folder that the user names; None: a new one in `memscope-runs`, which no other profile uses, not
            even one that starts in the same second.
        target: the target, which names a new folder.

    Raises:
        UsageError: the folder cannot be created.
    """
    folder = output or RUNS / f"{Path(target).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if output and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: -o takes a folder, for example -o runs/first")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if output:
            output.mkdir(parents=True, exist_ok=True)
        else:
            RUNS.mkdir(exist_ok=True)
            folder = _claimed(folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: the folder cannot be created ({error.strerror}): choose another one with -o"
        ) from error
    try:
        yield folder
    finally:
        for path in dict.fromkeys((folder, *new)):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _claimed(folder: Path) -> Path:
    """A folder that did not exist before: `folder`, or the same name with a number."""
    names = itertools.chain([folder.name], (f"{folder.name}-{number}" for number in itertools.count(2)))
    for path in map(folder.with_name, names):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("unreachable")  # there is no last number


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """Return a hidden folder of this process's own for files that are moved into `folder` when they are whole."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as scratch:
        yield Path(scratch)
