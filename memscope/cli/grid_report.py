"""What `memscope profile --grid` shows: Table 2 in the terminal, as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.grid import Cell, Grid
from memscope.units import format_bytes

__all__ = ["FORMATS", "grid_document", "print_grid"]

_RUNS_OUT = "×"


def print_grid(console: Console, grid: Grid, baselines: Sequence[str]) -> None:
    """Table 2 and what it rests on; `baselines` says in words what strategies asked of the runs without them."""
    table = Table(title=_title(grid))
    for heading in grid.factors:
        table.add_column(heading, justify="center", overflow="fold")
    for heading in _headings(grid):
        table.add_column(heading, justify="right")
    for cell in grid.cells:
        table.add_row(*_words(cell), style="" if cell.fits else "red")
    console.print(table)
    for note in _notes(grid, baselines):
        console.print(Text(note, style="dim"))


def grid_document(
    grid: Grid, plans: Sequence[Sequence[str]], paths: Sequence[Path], baselines: Sequence[str]
) -> dict[str, Any]:
    """Table 2 as one JSON value, sizes in bytes; `paths` of traces that are not there are null."""
    return {
        "schema_version": 1,
        "target": grid.target,
        "device": {"name": grid.device, "simulated": grid.predicted},
        "memory_limit": grid.memory_bytes,
        "factors": list(grid.factors),
        "samples": grid.samples,
        "samples_per_step": grid.samples_per_step,
        "table2": [
            {
                "strategies": plan,
                "applied": dict(zip(grid.factors, cell.applied, strict=True)),
                "fits": cell.fits,
                "peak": {"allocated": cell.allocated_bytes, "reserved": cell.reserved_bytes},
                "seconds": None if grid.predicted else cell.seconds,
                "estimated_seconds": cell.seconds if grid.predicted else None,
                "trace": str(path) if path.exists() else None,
            }
            for cell, plan, path in zip(grid.cells, plans, paths, strict=True)
        ],
        "notes": list(_notes(grid, baselines)),
    }


def _csv(grid: Grid, baselines: Sequence[str]) -> str:
    """One row a combination; numbers are empty where they are not known. What is predicted says so in each row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["fits", "peak_allocated_mib", "peak_reserved_mib", "run_seconds", "samples", "device", "how"]
    writer.writerow([*grid.factors, *columns])
    how = "predicted" if grid.predicted else "measured"
    for cell in grid.cells:
        sizes = ["" if size is None else size / 2**20 for size in (cell.allocated_bytes, cell.reserved_bytes)]
        seconds = "" if cell.seconds is None else cell.seconds
        writer.writerow([*map(int, cell.applied), int(cell.fits), *sizes, seconds, grid.samples, grid.device, how])
    return text.getvalue()


def _markdown(grid: Grid, baselines: Sequence[str]) -> str:
    """A table with its title above and its notes below."""
    headings = [*grid.factors, *_headings(grid)]
    rule = [":-:"] * len(grid.factors) + ["--:"] * (len(headings) - len(grid.factors))
    rows = [headings, rule, *map(_words, grid.cells)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([_title(grid), "", *lines, "", *(f"- {note}" for note in _notes(grid, baselines)), ""])


FORMATS: Mapping[str, Callable[[Grid, Sequence[str]], str]] = {".csv": _csv, ".md": _markdown}
"""How a file's name ends, and the text that is written into it."""


def _title(grid: Grid) -> str:
    return f"Table 2: {grid.target} on {grid.device}, {'predicted' if grid.predicted else 'measured'}"


def _headings(grid: Grid) -> list[str]:
    time = "run time (s), estimate" if grid.predicted else "run time (s)"
    return ["peak allocated (MiB)", "peak reserved (MiB)", time]


def _words(cell: Cell) -> list[str]:
    sizes = [_size(cell, size) for size in (cell.allocated_bytes, cell.reserved_bytes)]
    time = "–" if cell.seconds is None else f"{cell.seconds:,.{1 if cell.seconds >= 10 else 2}f}"
    return [*("✓" if on else "–" for on in cell.applied), *sizes, time if cell.fits else _RUNS_OUT]


def _size(cell: Cell, size_bytes: int | None) -> str:
    shown = "" if size_bytes is None else f"{size_bytes / 2**20:,.1f}"
    return shown or "–" if cell.fits else f"{_RUNS_OUT} {shown}".rstrip()


def _notes(grid: Grid, baselines: Sequence[str]) -> Iterator[str]:
    if grid.predicted:
        yield "Predicted: nothing was computed. Peaks are simulated, the run time is an estimate."
    if grid.memory_bytes is not None:
        yield f"PyTorch could take {format_bytes(grid.memory_bytes)} of the GPU."
    if any(not cell.fits for cell in grid.cells):
        needed = "; beside it what it would need" if grid.predicted else ""
        yield f"{_RUNS_OUT}: runs out of memory{needed}."
    for text in baselines:
        yield f"Off means: {text[0].lower()}{text[1:]}."
    if grid.steps is None:
        yield "No run time: the samples in a step's batch cannot be counted."
    elif any(cell.seconds is not None for cell in grid.cells):
        yield (
            f"Run time: {grid.samples} samples are {grid.steps} optimizer steps of {grid.samples_per_step} samples; "
            "each counts as long as the one that was run, on the target's first batch."
        )
    elif grid.predicted and any(cell.fits for cell in grid.cells):
        yield f'No run time: the rates of "{grid.device}" are not known; choose a certain GPU, such as a100-40gb.'
