"""Which target a command is about, and with which settings, from the words of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memscope.errors import TraceFileError, UsageError
from memscope.trace import Trace

__all__ = ["RUNS", "last_profiled", "settings_of"]

RUNS = Path("memscope-runs")
"""Where `memscope profile` puts its traces, one folder a run."""
_DEFAULT_TARGET = "targets/llama2"


def settings_of(texts: Sequence[str]) -> dict[str, str]:
    """`{key: value}` of words KEY=VALUE.

    Raises:
        UsageError: when a word is no setting, or a key is there twice.
    """
    words: dict[str, str] = {}
    for text in texts:
        key, equal, value = text.partition("=")
        if not equal or not key:
            raise UsageError(
                f'"{text}" is no setting: expected KEY=VALUE, for example n_layers=1. See: memscope targets'
            )
        if key in words:
            raise UsageError(f'setting "{key}" is given twice: "{words[key]}" and "{value}"')
        words[key] = value
    return words


def last_profiled(preset: str | None, settings: dict[str, str]) -> tuple[str, str | None, dict[str, str]]:
    """Target, preset and settings of the newest trace in `RUNS`, or the target that comes with memscope.

    A preset given here replaces preset and settings of the trace; settings given here come on top.
    """
    for path in sorted(RUNS.glob("*/*.npz"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            command = Trace.load(path).meta.get("command")
        except TraceFileError:
            continue
        if command:
            before = {} if preset else command["settings"]
            return command["target"], preset or command["preset"], {**before, **settings}
    return _DEFAULT_TARGET, preset, settings
