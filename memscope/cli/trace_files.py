"""Trace files named on the command line, as runs with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memscope.analysis.effects import Run
from memscope.errors import UsageError
from memscope.trace import Trace

__all__ = ["load_run", "load_runs", "refuse_pickle"]


def load_run(path: Path) -> Run:
    """The trace in a file, named for the file.

    Raises:
        TraceFileError: when it cannot be read, is no trace, or one of a newer memscope.
        UsageError: when it is a pickle, which `memscope import` turns into a trace, or holds no allocation.
    """
    refuse_pickle(path)
    trace = Trace.load(path)
    if not trace.events:
        raise UsageError(f"{path}: the trace is empty: nothing was allocated in that run, so there is nothing to show")
    return Run(path.stem, trace)


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The traces in several files; files alike in name are named by their whole path.

    Raises:
        TraceFileError: as `load_run`.
        UsageError: as `load_run`, and when a file is named twice.
    """
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice: name each file once")
    stems = [path.stem for path in paths]
    runs = [load_run(path) for path in paths]
    return [
        run if stems.count(run.label) == 1 else Run(str(path), run.trace) for path, run in zip(paths, runs, strict=True)
    ]


def refuse_pickle(path: Path) -> None:
    """See that a file does not begin as a pickle does.

    Raises:
        UsageError: when it does.
    """
    try:
        with open(path, "rb") as opened:
            beginning = opened.read(1)
    except OSError:
        return  # loading it says why
    if beginning == b"\x80":
        raise UsageError(f"{path} is a pickle, not a trace: turn it into one first, memscope import {path}")
