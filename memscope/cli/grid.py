"""`memscope profile --grid`: the combinations to run, and Table 2 of their traces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from memscope.analysis.effects import Run, Table1
from memscope.analysis.grid import Combination, Grid, SettingValue, combinations, table2
from memscope.analysis.grid_words import grid_notes
from memscope.analysis.notes import notes_of
from memscope.cli.grid_document import grid_document
from memscope.cli.grid_report import FORMATS, print_grid
from memscope.cli.next_command import compare_words, print_next
from memscope.cli.profile_options import ProfileOptions
from memscope.cli.profile_report import print_places, write_page
from memscope.cli.profile_runs import is_auto
from memscope.command.output import Attempt, require_writable
from memscope.errors import MemscopeError, UsageError
from memscope.strategies import Plan, Strategy, read_alternatives
from memscope.trace import Trace, write_whole
from memscope.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from memscope.dashboards.html import Section

__all__ = ["AskedGrid", "asked_grid", "show_grid"]

_SAMPLES = 200
"""Default number of samples of a run: that of the LLaMA2 target."""


@dataclass(frozen=True)
class AskedGrid:
    """Every combination of some strategies, with every value of some settings."""

    factors: tuple[SettingValue | Strategy, ...]
    """The values of settings, then the strategies; alternatives beside each other."""
    combinations: tuple[Combination, ...]
    """The first has no strategy, the last has all."""
    samples: int
    memory_bytes: int | None
    """Most GPU memory that PyTorch may use; None: all of it."""
    table: Path | None

    @property
    def labels(self) -> list[str]:
        """The name of each run."""
        return [_label(one) for one in self.combinations]

    @property
    def plans(self) -> list[tuple[Mapping[str, str], list[Plan]]]:
        """Each set of values of the settings that vary, and the plans that are run with it."""
        return [
            (settings, [one.plan for one in each])
            for settings, each in groupby(self.combinations, key=lambda one: one.settings)
        ]


def _label(one: Combination) -> str:
    words = [f"{key}={value}" for key, value in one.settings.items()]
    return ",".join([*words, *([str(one.plan)] if one.plan else [])]) or "baseline"


def asked_grid(options: ProfileOptions, device: str) -> AskedGrid | None:
    """The grid of the options; None without `--grid`.

    Raises:
        UsageError: when options exclude each other, or the grid, the memory or the file of the table cannot be used.
    """
    text, table = options.grid, options.table
    if text is None:
        others = {"--vary": options.vary, "--samples": options.samples, "--memory": options.memory, "--table": table}
        given = [name for name, value in others.items() if value not in (None, ())]
        if given:
            raise UsageError(f"{given[0]} needs Table 2: add --grid, for example --grid ga,amp,lora")
        return None
    if options.plans:
        raise UsageError(
            f'--grid runs every combination of its strategies and no other plan: leave out -s "{options.plans[0]}", '
            "or name its strategies in --grid"
        )
    alternatives = read_alternatives(text)
    settings = [_varied(text) for text in options.vary]
    found = combinations(alternatives, settings)
    if any(is_auto(one.plan) for one in found):
        raise UsageError("ckpt:auto makes a plan for one combination only: in --grid, name the layers to checkpoint")
    if table is not None:
        _require_table(table, options.force)
    memory_bytes = _memory_bytes(options.memory, device)
    factors: tuple[SettingValue | Strategy, ...] = (
        *chain.from_iterable(settings),
        *chain.from_iterable(alternatives),
    )
    return AskedGrid(factors, tuple(found), options.samples or _SAMPLES, memory_bytes, table)


def _varied(text: str) -> list[SettingValue]:
    """The values of a setting in KEY=A/B."""
    key, equal, values = text.partition("=")
    found = [SettingValue(key, value) for value in values.split("/")]
    if not equal or not key or not all(one.value for one in found):
        raise UsageError(f'--vary "{text}": expected a setting and its values, such as n_layers=1/32')
    if len(set(found)) < len(found):
        raise UsageError(f'--vary "{text}": a value is twice; leave one out')
    return found


def show_grid(
    asked: AskedGrid,
    found: Sequence[tuple[Path, Trace | MemscopeError]],
    page: Path,
    baselines: Sequence[str],
    attempt: Attempt,
    as_json: bool,
) -> None:
    """Print Table 2, and write it and the page.

    `found` has the file of each combination's trace, and the trace or the error of its run.
    """
    results = [one for _, one in found]
    outcomes = [(one.applied, result) for one, result in zip(asked.combinations, results, strict=True)]
    grid = table2(asked.factors, outcomes, asked.samples, asked.memory_bytes)
    runs = [Run(label, one) for label, one in zip(asked.labels, results, strict=True) if isinstance(one, Trace)]
    of_runs = (f"{run.label}: {note}" for run in runs for note in notes_of(run.trace))
    notes = [*grid_notes(grid, baselines), *of_runs]
    has_page = attempt(write_page, runs, Table1(()), baselines, page, more=[_card(grid, notes)])
    if asked.table is not None:
        attempt(write_whole, asked.table, FORMATS[asked.table.suffix](grid, notes).encode())
    if as_json:
        specs = [one.plan.specs for one in asked.combinations]
        document = grid_document(grid, specs, [path for path, _ in found], notes)
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False)
    print_grid(console, grid, notes)
    print_places(console, found[0][0].parent, page if has_page else None)
    print_next(console, compare_words([path for path, one in found if isinstance(one, Trace)]))


def _card(grid: Grid, notes: Sequence[str]) -> Section:
    from memscope.dashboards.grid_card import grid_card

    return grid_card(grid, notes)


def _require_table(path: Path, force: bool) -> None:
    if path.suffix not in FORMATS:
        raise UsageError(f"--table {path}: expected a name that ends in {' or '.join(FORMATS)}")
    require_writable(path, overwrite=force, option="--table")


def _memory_bytes(text: str | None, device: str) -> int | None:
    if text is None:
        return None
    size_bytes = parse_bytes(text)
    if device != "cuda":
        raise UsageError(
            f'--memory limits the GPU memory of a measured run, and this run is for "{device}": to predict a smaller '
            "card, name it with --device (see: memscope devices), or describe it with --device-file"
        )
    import torch

    total_bytes = torch.cuda.mem_get_info()[1]
    if size_bytes > total_bytes:
        raise UsageError(f"--memory {text}: expected at most the memory of the GPU, {format_bytes(total_bytes)}")
    return size_bytes
