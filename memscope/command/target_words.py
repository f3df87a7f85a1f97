"""The words of a command line that name a target, its preset and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from memscope.errors import TraceFileError, UsageError
from memscope.trace import Trace

__all__ = ["RUNS", "last_profiled", "settings_of", "short_name", "words_of"]

RUNS = Path("memscope-runs")
"""Folder of the runs, one folder each; traces of `memscope profile`, results of fine-tuning."""
_DEFAULT_TARGET = "targets/llama2"


def settings_of(texts: Sequence[str], *, trust_remote_code: bool = False) -> dict[str, str]:
    """`{key: value}` of words KEY=VALUE; `trust_remote_code` adds the setting of that name, as `--trust-remote-code`.

    Raises:
        UsageError: when a word is not KEY=VALUE, or a key is given twice.
    """
    words: dict[str, str] = {}
    for text in (*texts, *(["trust_remote_code=true"] if trust_remote_code else [])):
        key, equal, value = text.partition("=")
        if not equal or not key:
            raise UsageError(f'"{text}" is not a KEY=VALUE setting, for example n_layers=1. See: memscope targets')
        if key in words:
            raise UsageError(f'setting "{key}" is given twice: "{words[key]}" and "{value}"')
        words[key] = value
    return words


def short_name(target: str) -> str:
    """A target's name for a folder: `mine` of path/mine.py, `Llama-2-7b-hf` of hf:meta-llama/Llama-2-7b-hf."""
    name, colon, argument = target.partition(":")
    path = Path(argument.rstrip("/") if colon and len(name) > 1 else target)
    if path.name == "config.json":
        path = path.parent
    return (path.stem if path.suffix in (".py", ".json", ".yml", ".yaml") else path.name) or name


def words_of(target: str, preset: str | None, settings: Mapping[str, str]) -> list[str]:
    """The words that name a target with its preset and settings, as commands take them."""
    chosen = [] if preset is None else ["--preset", preset]
    changed = [f"{key}={value}" for key, value in settings.items()]
    return [target, *chosen, *(["--set", *changed] if changed else [])]


def last_profiled(preset: str | None, settings: dict[str, str]) -> tuple[str, str | None, dict[str, str]]:
    """Target, preset and settings of the newest trace in `RUNS`, or else the target that comes with memscope.

    A preset given here replaces preset and settings of the trace; settings given here are added to them.
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
