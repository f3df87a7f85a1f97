"""The last line of a command: the next useful command, which works as it is printed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.text import Text

from memscope.command.target_words import words_of

if TYPE_CHECKING:
    from memscope.advisor.measure.runner import Scene

__all__ = [
    "FIRST_PROFILE",
    "AskedMachine",
    "compare_words",
    "export_words",
    "machine_words",
    "page_beside",
    "print_next",
    "profile_words",
    "report_words",
]


FIRST_PROFILE = ("memscope", "profile", "targets/llama2", "--preset", "debug")
"""A profile of a small model, which takes seconds; strategies and device may follow."""


class AskedMachine(Protocol):
    """What a command is asked of the simulated machine, beside its device."""

    @property
    def device_file(self) -> Path | None:
        """TOML file with more devices."""

    @property
    def allocator(self) -> str | None:
        """Settings of PyTorch's allocator."""

    @property
    def assume(self) -> str:
        """What a simulation takes for values that it cannot know."""


def print_next(console: Console, words: Sequence[object]) -> None:
    """Print `Next: …`, quoted for a shell, on one line that can be copied; nothing if there are no words."""
    if words:
        console.print(Text(f"Next: {shlex.join(map(str, words))}"), soft_wrap=True)


def profile_words(scene: Scene) -> list[str]:
    """`memscope profile …` for the same workload on the same device."""
    words = words_of(scene.target, scene.preset, scene.settings)
    return ["memscope", "profile", *words, *machine_words(scene), "--device", scene.device]


def machine_words(asked: AskedMachine) -> list[str]:
    """The options that say, beside `--device`, how a machine is simulated."""
    words = ["--device-file", str(asked.device_file)] if asked.device_file is not None else []
    words += ["--allocator", asked.allocator] if asked.allocator is not None else []
    return [*words, *(["--assume", asked.assume] if asked.assume else [])]


def report_words(traces: Sequence[Path]) -> list[object]:
    """`memscope report …`: as a page, or in the terminal where a page of that name exists already."""
    words = ["memscope", "report", *traces]
    return [*words, "--format", "terminal"] if page_beside(traces).exists() else words


def compare_words(traces: Sequence[Path]) -> list[object]:
    """`memscope diff …` of the first and the last trace; a report in the terminal if there is only one."""
    first, *others = traces
    if others:
        return ["memscope", "diff", first, others[-1]]
    return ["memscope", "report", first, "--format", "terminal"]


def page_beside(files: Sequence[Path]) -> Path:
    """Where the page of some files goes: beside the first, with its name if it is the only one."""
    first, *others = files
    return first.parent / "report.html" if others else first.with_suffix(".html")


def export_words(trace: Path) -> list[object]:
    """`memscope export …` for Perfetto; overwrites an export of the same trace."""
    words = ["memscope", "export", trace, "--to", "perfetto"]
    return [*words, "-f"] if trace.with_suffix(".trace.json").exists() else words
