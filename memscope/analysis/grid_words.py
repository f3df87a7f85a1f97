"""Table 2 as text: the title, headings, cells and notes that all its formats share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from memscope.analysis.grid import Cell, Grid
from memscope.units import format_both, format_seconds

__all__ = ["FAILED", "RUNS_OUT", "cell_name", "grid_headings", "grid_notes", "grid_rows", "grid_title"]

RUNS_OUT = "×"
"""Marks a combination that runs out of memory."""
FAILED = "?"
"""Marks a combination whose run failed."""


def grid_title(grid: Grid) -> str:
    """`Table 2: llama2 on a100-40gb, predicted`."""
    return f"Table 2: {grid.target} on {grid.device}, {'predicted' if grid.predicted else 'measured'}"


def grid_headings(grid: Grid) -> list[str]:
    """The heading of each column: the factors, then the figures."""
    time = "run time, estimate" if grid.predicted else "run time"
    return [*grid.factors, "peak allocated (MiB)", "peak reserved (MiB)", time]


def cell_name(grid: Grid, cell: Cell) -> str:
    """`n_layers=1, ga:steps=2, lora`: the factors that a combination has."""
    return ", ".join(itertools.compress(grid.factors, cell.applied)) or "no strategy"


def grid_rows(grid: Grid) -> list[list[str]]:
    """The cells of each combination, under `grid_headings`."""
    return [_words(cell) for cell in grid.cells]


def _words(cell: Cell) -> list[str]:
    if cell.fits is None:
        return [*("✓" if on else "–" for on in cell.applied), FAILED, FAILED, FAILED]
    sizes = [_size(cell, size) for size in (cell.allocated_bytes, cell.reserved_bytes)]
    time = "–" if cell.seconds is None else format_seconds(cell.seconds)
    return [*("✓" if on else "–" for on in cell.applied), *sizes, time if cell.fits else RUNS_OUT]


def _size(cell: Cell, size_bytes: int | None) -> str:
    shown = "" if size_bytes is None else f"{size_bytes / 2**20:,.1f}"
    return shown or "–" if cell.fits else f"{RUNS_OUT} {shown}".rstrip()


def grid_notes(grid: Grid, baselines: Sequence[str]) -> Iterator[str]:
    """Sentences on the basis of the table; `baselines` says in words what strategies asked of the runs without them."""
    if grid.predicted:
        yield "Predicted: nothing was computed. Peaks are simulated, and the run time is an estimate."
    if grid.memory_bytes is not None:
        yield f"PyTorch could use {format_both(grid.memory_bytes)} of the GPU."
    if any(cell.fits is False for cell in grid.cells):
        needed = "; the figures beside it assume unlimited memory" if grid.predicted else ""
        yield f"{RUNS_OUT}: runs out of memory{needed}."
    for cell in grid.cells:
        if cell.fits is None:
            yield f"{FAILED}: the run with {cell_name(grid, cell)} failed: {cell.failure}."
    for text in baselines:
        yield f"Off means: {text[0].lower()}{text[1:]}."
    steps = [f"{grid.steps(size)} optimizer steps of {_samples(size)}" for size in grid.samples_per_step]
    if not steps:
        yield "No run time: the samples in the batch of a step cannot be counted."
    elif any(cell.seconds is not None for cell in grid.cells):
        yield (
            f"Run time: {_samples(grid.samples)} are {' or '.join(steps)}; "
            "each is assumed to take as long as the step that was run, on the target's first batch."
        )
        if len(steps) > 1:
            yield "Compare times of steps with different numbers of samples only if all samples have the same length."
    elif grid.predicted and any(cell.fits for cell in grid.cells):
        yield f'No run time: the rates of "{grid.device}" are unknown; choose a specific GPU, such as a100-40gb.'


def _samples(number: int) -> str:
    return "1 sample" if number == 1 else f"{number} samples"
