"""Watching a training run: a progress bar on stderr, the metrics files, and stopping on a signal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memscope.targets.training.metrics import Metric, Stepped, metrics_written
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.session import Session
from memscope.targets.training.train import Watch
from memscope.units import format_bytes

__all__ = ["watched"]

_SECONDS_BETWEEN_DRAWINGS = 0.5  # drawing the bar costs the training a millisecond or two


@contextmanager
def watched(session: Session, folder: RunFolder) -> Iterator[Watch]:
    """Write metrics, show a progress bar, and on SIGINT or SIGTERM stop after the step; a second signal stops at once.

    Raises:
        MemscopeError: the metrics cannot be written.
    """

    def say(text: str) -> None:
        click.echo(text, err=True)

    with (
        _stop_asked() as stopped,
        metrics_written(folder.metrics, folder.board, session.done, say) as write,
        _bars(Console(stderr=True)) as bars,
    ):
        task = bars.add_task("training", total=session.steps, completed=session.done, measured="")
        drawn = 0.0

        def show(step: Stepped) -> None:
            nonlocal drawn
            now = time.monotonic()
            due = now - drawn >= _SECONDS_BETWEEN_DRAWINGS
            bars.update(task, completed=step.step, measured=_in_words(step), refresh=due)
            drawn = now if due else drawn

        yield _Watched(write, show, stopped)


def _bars(console: Console) -> Progress:
    """A progress bar that fits 80 columns, peak included."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps{task.fields[measured]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, auto_refresh=False)


def _in_words(step: Stepped) -> str:
    peak = "" if step.peak_bytes is None else f", peak {format_bytes(step.peak_bytes)}"
    return f", loss {step.loss:.4f}, {step.tokens_per_second:,.0f} tokens/s{peak}"


@dataclass(frozen=True)
class _Watched:
    """A `Watch` for the command line."""

    write: Callable[[Metric], None]
    show: Callable[[Stepped], None]
    stopped: Callable[[], bool]

    def metric(self, metric: Metric) -> None:
        self.write(metric)
        if isinstance(metric, Stepped):
            self.show(metric)


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Give a function that returns whether SIGINT or SIGTERM asked the run to stop."""
    asked: list[int] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        # Not `print`: the signal may have interrupted one.
        os.write(2, b"\nstopping after this step, with a checkpoint; a second Ctrl-C stops at once, without one\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
