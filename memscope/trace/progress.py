"""The callback that reports the progress of long work."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "no_progress"]

Progress = Callable[[str, int, int], None]
"""`progress(name of the work, units done, total units)`."""


def no_progress(work: str, done: int, total: int) -> None:
    """Report nothing."""
