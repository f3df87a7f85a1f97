"""Table 2 in the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.analysis.grid import Cell, Grid
from memscope.analysis.grid_words import cell_name, grid_headings, grid_rows, grid_title
from memscope.cli.tables import StackedBlock, print_table

__all__ = ["FORMATS", "print_grid"]


def print_grid(console: Console, grid: Grid, notes: Sequence[str]) -> None:
    """Print Table 2 and the notes on its basis."""
    print_table(console, _table(grid), blocks=_stacked(grid))
    for note in notes:
        console.print(Text(note, style="dim"))


def _table(grid: Grid) -> Table:
    table = Table(title=Text(grid_title(grid)))
    for index, heading in enumerate(grid_headings(grid)):
        is_factor = index < len(grid.factors)
        table.add_column(Text(heading), justify="center" if is_factor else "right", overflow="fold")
    for cell, words in zip(grid.cells, grid_rows(grid), strict=True):
        table.add_row(*words, style=_style(cell))
    return table


def _stacked(grid: Grid) -> Iterator[StackedBlock]:
    """A block for each combination, under the strategies that it applies."""
    figures = slice(len(grid.factors), None)
    for cell, words in zip(grid.cells, grid_rows(grid), strict=True):
        lines = list(zip(grid_headings(grid)[figures], words[figures], strict=True))
        yield StackedBlock(Text(cell_name(grid, cell)), lines, _style(cell))


def _style(cell: Cell) -> str:
    return "red" if cell.fits is False else ""


def _csv(grid: Grid, notes: Sequence[str]) -> str:
    """One row a combination; unknown numbers are empty, and each row says whether it is predicted or measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["fits", "peak_allocated_mib", "peak_reserved_mib", "run_seconds", "samples", "device", "how"]
    writer.writerow([*grid.factors, *columns])
    how = "predicted" if grid.predicted else "measured"
    for cell in grid.cells:
        sizes = ["" if size is None else size / 2**20 for size in (cell.allocated_bytes, cell.reserved_bytes)]
        seconds = "" if cell.seconds is None else cell.seconds
        fits = "" if cell.fits is None else int(cell.fits)
        writer.writerow([*map(int, cell.applied), fits, *sizes, seconds, grid.samples, grid.device, how])
    return text.getvalue()


def _markdown(grid: Grid, notes: Sequence[str]) -> str:
    """The title, the table and the notes."""
    headings = grid_headings(grid)
    rule = [":-:"] * len(grid.factors) + ["--:"] * (len(headings) - len(grid.factors))
    lines = [f"| {' | '.join(row)} |" for row in (headings, rule, *grid_rows(grid))]
    return "\n".join([grid_title(grid), "", *lines, "", *(f"- {note}" for note in notes), ""])


FORMATS: Mapping[str, Callable[[Grid, Sequence[str]], str]] = {".csv": _csv, ".md": _markdown}
"""The text of a table with its notes, by the suffix of the file."""
