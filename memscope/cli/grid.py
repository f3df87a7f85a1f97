"""`memscope profile --grid`: what was asked for, and what comes of the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from memscope.advisor.resolve import is_auto
from memscope.cli.grid_document import grid_document
from memscope.cli.grid_report import FORMATS, print_grid
from memscope.cli.profile_report import print_next, write_page
from memscope.effects import Run, Table1
from memscope.errors import UsageError
from memscope.grid import Grid, combinations, table2
from memscope.grid_words import grid_notes
from memscope.skipped import how_skipped
from memscope.strategies import Plan, Strategy, read_strategies
from memscope.trace import Trace, write_whole
from memscope.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from memscope.dashboards.html import Section

__all__ = ["AskedGrid", "asked_grid", "show_grid"]

_SAMPLES = 200
"""Samples of a run where nothing else is said: as many as LLaMA2 is tuned on by default."""


@dataclass(frozen=True)
class AskedGrid:
    """Every combination of some strategies."""

    factors: tuple[Strategy, ...]
    applied: tuple[tuple[bool, ...], ...]
    """Of each combination, which factors it applies."""
    plans: tuple[Plan, ...]
    """Of each combination: first none, last all."""
    samples: int
    memory_bytes: int | None
    """Most that PyTorch may take of the GPU; None: all of it."""
    table: Path | None

    @property
    def labels(self) -> list[str]:
        """What each run is called."""
        return [str(plan) or "baseline" for plan in self.plans]


def asked_grid(
    text: str | None,
    plans: Sequence[str],
    samples: int | None,
    memory: str | None,
    table: Path | None,
    device: str,
    force: bool,
) -> AskedGrid | None:
    """The grid that was asked for; None without `--grid`.

    Raises:
        UsageError: when options do not go together, or the grid, the memory or the table's file cannot be used.
    """
    options = {"--samples": samples, "--memory": memory, "--table": table}
    if text is None:
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise UsageError(f"{given[0]} is for Table 2: give --grid as well, for example --grid ga,amp,lora")
        return None
    if plans:
        raise UsageError(
            f'--grid runs every combination of its strategies and no other plan: leave out -s "{plans[0]}", '
            "or name its strategies in --grid"
        )
    factors = tuple(read_strategies(text))
    found = combinations(factors)
    if is_auto(found[-1][1]):
        raise UsageError("ckpt:auto is planned for one combination alone: in --grid, say which layers to checkpoint")
    if table is not None:
        _refuse_table(table, force)
    applied, combined = zip(*found, strict=True)
    return AskedGrid(factors, applied, combined, samples or _SAMPLES, _memory_bytes(memory, device), table)


def show_grid(
    asked: AskedGrid, paths: Sequence[Path], html: Path, baselines: Sequence[str], *, overwrite: bool, as_json: bool
) -> None:
    """Print Table 2, and write it and the page; `paths` are those of the traces, where there is one."""
    traces = [Trace.load(path) if path.exists() else None for path in paths]
    grid = table2(asked.factors, list(zip(asked.applied, traces, strict=True)), asked.samples, asked.memory_bytes)
    runs = [Run(label, trace) for label, trace in zip(asked.labels, traces, strict=True) if trace is not None]
    skipped = (f"{run.label}: {how}." for run in runs if (how := how_skipped(run.trace)))
    notes = [*grid_notes(grid, baselines), *skipped]
    write_page(runs, Table1(()), baselines, html, more=[_card(grid, notes)], overwrite=overwrite)
    if asked.table is not None:
        write_whole(asked.table, FORMATS[asked.table.suffix](grid, notes).encode())
    if as_json:
        specs = [plan.specs for plan in asked.plans]
        click.echo(json.dumps(grid_document(grid, specs, paths, notes), ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False)
    print_grid(console, grid, notes)
    print_next(console, paths[0].parent, html)


def _card(grid: Grid, notes: Sequence[str]) -> Section:
    from memscope.dashboards.grid_card import grid_card

    return grid_card(grid, notes)


def _refuse_table(path: Path, force: bool) -> None:
    if path.suffix not in FORMATS:
        raise UsageError(f"--table {path}: expected a name that ends in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--table {path}: there is no folder {path.parent}: make it, or choose another file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already: choose another file with --table, or overwrite with -f")


def _memory_bytes(text: str | None, device: str) -> int | None:
    if text is None:
        return None
    size_bytes = parse_bytes(text)
    if device != "cuda":
        raise UsageError(
            f'--memory limits what a measured run may take of the GPU, and this one is for "{device}": to predict a '
            "smaller card name it with --device (see: memscope devices), or describe it with --device-file"
        )
    import torch

    total_bytes = torch.cuda.mem_get_info()[1]
    if size_bytes > total_bytes:
        raise UsageError(f"--memory {text}: the GPU has {format_bytes(total_bytes)}: expected no more than that")
    return size_bytes
