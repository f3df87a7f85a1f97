"""What a command writes: its results on stdout, and files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

from memscope.errors import MemscopeError, UsageError

__all__ = ["Attempt", "errors_told_last", "keep_stdout_for_results", "require_writable"]

P = ParamSpec("P")


def keep_stdout_for_results() -> None:
    """Keep stdout for `sys.stdout`: libraries and child processes that write to file descriptor 1 write to stderr.

    Python code of a target also writes to `sys.stdout`; a command that runs such code redirects it meanwhile.
    """
    try:
        sys.stdout.flush()
        results = os.dup(1)
        os.dup2(2, 1)
    except (OSError, AttributeError):  # stdout or stderr is closed
        return
    sys.stdout = open(results, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


class Attempt:
    """Does the last things of a command, and keeps their errors until the results are shown."""

    def __init__(self) -> None:
        self._errors: list[MemscopeError] = []

    def __call__(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether `work(*args, **kwargs)` ended without a `MemscopeError`."""
        try:
            work(*args, **kwargs)
        except MemscopeError as error:
            self.note(error)
            return False
        return True

    def note(self, error: MemscopeError) -> None:
        """Keep an error until the end."""
        self._errors.append(error)

    def raise_noted(self) -> None:
        """Raise what was noted as one error, of the kind of the first.

        Raises:
            MemscopeError: an error was noted.
        """
        if self._errors:
            first = self._errors[0]
            texts = dict.fromkeys(map(str, self._errors))
            raise type(first)("\n".join(texts)) from first


@contextmanager
def errors_told_last() -> Iterator[Attempt]:
    """A block that shows results whatever becomes of its last writes; their errors are raised at its end."""
    attempt = Attempt()
    yield attempt
    attempt.raise_noted()


def require_writable(path: Path, *, overwrite: bool, option: str = "-o", force: str = "-f") -> None:
    """Check, before the work begins, that a file may be written.

    Args:
        path: the file.
        overwrite: whether it may exist.
        option: the option or argument that names it, for the message.
        force: the option or argument that allows to overwrite it, for the message.

    Raises:
        UsageError: when it exists, is a folder, or lies in a folder that does not exist or is not writable.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: {option} takes a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: choose another file with {option}, or overwrite it with {force}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: create it, or choose another file with {option}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {path.parent} is not writable: choose another file with {option}")
