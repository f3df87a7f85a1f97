"""Files that a command is about to write."""

from __future__ import annotations

from pathlib import Path

from memscope.errors import UsageError

__all__ = ["require_writable"]


def require_writable(path: Path, *, overwrite: bool, option: str = "-o") -> None:
    """Check, before the work begins, that a file may be written.

    Args:
        path: the file.
        overwrite: whether it may exist.
        option: the option that names it, for the message.

    Raises:
        UsageError: when it exists, is a folder, or lies in a folder that does not exist.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: {option} takes a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: choose another file with {option}, or overwrite it with -f")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: create it, or choose another file with {option}")
