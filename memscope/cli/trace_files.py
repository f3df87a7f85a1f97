"""Trace files named on the command line, as runs with labels."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from memscope.analysis.effects import Run
from memscope.errors import UsageError
from memscope.trace import Trace

__all__ = ["load_run", "load_runs", "refuse_pickle"]


def load_run(path: Path) -> Run:
    """The trace in a file, as a run that has the name of the file.

    Raises:
        TraceFileError: when the file cannot be read, is not a trace, or was written by a newer memscope.
        UsageError: when the file is a pickle, which `memscope import` converts, or the trace has no allocation.
    """
    refuse_pickle(path)
    trace = Trace.load(path)
    if not trace.events:
        raise UsageError(f"{path}: the trace is empty: the run allocated nothing, so there is nothing to show")
    return Run(path.stem, trace)


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The traces in several files; where names are equal, runs have the whole path as their name.

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
    """Refuse a file that begins as a pickle does.

    Raises:
        UsageError: when the file is a pickle.
    """
    try:
        with open(path, "rb") as opened:
            beginning = opened.read(1)
    except OSError:
        return  # loading the trace reports why
    if beginning == b"\x80":
        raise UsageError(
            f"{path} is a pickle, not a trace: convert it first with memscope import {shlex.quote(str(path))}"
        )
