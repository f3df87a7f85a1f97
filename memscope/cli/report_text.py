"""A report as text: in the terminal, as Markdown, or as CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.analysis.effects import Run, Table1
from memscope.analysis.inferred import inferred_columns
from memscope.cli.report_tables import comparison_sections, fit_lines, headline, largest_sections
from memscope.cli.table_sections import TableSection, print_sections

__all__ = ["csv_text", "markdown", "markdown_table", "print_all"]


def _sections(runs: Sequence[Run], table: Table1) -> Iterable[TableSection]:
    yield from comparison_sections(runs, table, [])
    yield from largest_sections(runs)


def print_all(console: Console, runs: Sequence[Run], table: Table1) -> None:
    """Print every table of the report."""
    console.print(Text(headline(runs[0].trace), style="bold"))
    for note in fit_lines(runs):
        console.print(note)
    print_sections(console, _sections(runs, table))


def markdown(runs: Sequence[Run], table: Table1) -> str:
    """Every table of the report, as Markdown."""
    lines = [f"# {_escaped(headline(runs[0].trace))}"]
    lines += [line for note in fit_lines(runs) for line in ("", _escaped(note.plain))]
    for section in _sections(runs, table):
        lines += ["", *markdown_table(section.table)]
        lines += [line for note in section.notes for line in ("", _escaped(note.plain))]
    return "\n".join(lines) + "\n"


def markdown_table(table: Table) -> list[str]:
    """The lines of a table in Markdown: its title as a heading, the table, its caption."""
    columns = [[_cell(column.header), *map(_cell, column.cells)] for column in table.columns]
    right = ["---:" if column.justify == "right" else "---" for column in table.columns]
    header, *rows = ["| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True)]
    caption = ["", _escaped(_plain(table.caption))] if table.caption else []
    return [f"## {_escaped(_plain(table.title))}", "", header, "| " + " | ".join(right) + " |", *rows, *caption]


def _cell(value: object) -> str:
    return _escaped(_plain(value)).strip().replace("|", "\\|")


def _plain(value: object) -> str:
    return value.plain if isinstance(value, Text) else str(value)


def _escaped(text: str) -> str:
    """Escape characters that Markdown would read as HTML or emphasis, such as the stars of `layers.*`."""
    for character in "\\`*_<>[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def csv_text(runs: Sequence[Run]) -> str:
    """Allocations at each run's peak: a row a category, module and operator; `inferred` names inferred columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "category", "module", "op", "bytes", "inferred"])
    for run in runs:
        inferred = " ".join(inferred_columns(run.trace))
        for (category, module, op), size_bytes in run.trace.by("category", "module", "op").items():
            writer.writerow([run.label, category, module, op, size_bytes, inferred])
    return out.getvalue()
