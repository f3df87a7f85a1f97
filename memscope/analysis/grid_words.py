"""Table 2 in words: its title, headings, cells and notes, as every form of it has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memscope.analysis.grid import Cell, Grid
from memscope.units import format_bytes

__all__ = ["RUNS_OUT", "grid_headings", "grid_notes", "grid_rows", "grid_title"]

RUNS_OUT = "×"
"""Stands where a combination runs out of memory."""


def grid_title(grid: Grid) -> str:
    """`Table 2: llama2 on a100-40gb, predicted`."""
    return f"Table 2: {grid.target} on {grid.device}, {'predicted' if grid.predicted else 'measured'}"


def grid_headings(grid: Grid) -> list[str]:
    """One for each column: the factors, then the figures."""
    time = "run time (s), estimate" if grid.predicted else "run time (s)"
    return [*grid.factors, "peak allocated (MiB)", "peak reserved (MiB)", time]


def grid_rows(grid: Grid) -> list[list[str]]:
    """The cells of each combination, under `grid_headings`."""
    return [_words(cell) for cell in grid.cells]


def _words(cell: Cell) -> list[str]:
    sizes = [_size(cell, size) for size in (cell.allocated_bytes, cell.reserved_bytes)]
    time = "–" if cell.seconds is None else f"{cell.seconds:,.{1 if cell.seconds >= 10 else 2}f}"
    return [*("✓" if on else "–" for on in cell.applied), *sizes, time if cell.fits else RUNS_OUT]


def _size(cell: Cell, size_bytes: int | None) -> str:
    shown = "" if size_bytes is None else f"{size_bytes / 2**20:,.1f}"
    return shown or "–" if cell.fits else f"{RUNS_OUT} {shown}".rstrip()


def grid_notes(grid: Grid, baselines: Sequence[str]) -> Iterator[str]:
    """What the table rests on; `baselines` says in words what strategies asked of the runs without them."""
    if grid.predicted:
        yield "Predicted: nothing was computed. Peaks are simulated, the run time is an estimate."
    if grid.memory_bytes is not None:
        yield f"PyTorch could take {format_bytes(grid.memory_bytes)} of the GPU."
    if any(not cell.fits for cell in grid.cells):
        needed = "; beside it what it would need" if grid.predicted else ""
        yield f"{RUNS_OUT}: runs out of memory{needed}."
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
