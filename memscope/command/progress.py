"""Progress on stderr, for work that reports how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["shown_progress"]


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr while work goes on; yields the function that moves it: `moved(doing, done, total)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def moved(doing: str, done: int, total: int) -> None:
            bars.update(task, description=doing, completed=done, total=total)

        yield moved
