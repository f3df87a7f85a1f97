"""Tables with notes below them, printed in parts or stacked where the terminal has no room."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.cli.tables import Direction, is_narrow, print_table

__all__ = ["TableSection", "print_sections"]


@dataclass(frozen=True)
class TableSection:
    """A table that can be made of all its columns or of some of them, and the notes below it."""

    columns: Sequence[Any]
    table_of: Callable[[Sequence[Any]], Table]
    notes: Sequence[Text] = ()
    stacked: Direction = "columns"
    """How the table is stacked on a narrow terminal."""

    @property
    def table(self) -> Table:
        """The whole table."""
        return self.table_of(self.columns)


def print_sections(console: Console, sections: Iterable[TableSection]) -> None:
    """Print tables and their notes; a table that is too wide is printed in several parts, or stacked."""
    for section in sections:
        if is_narrow(console):
            print_table(console, section.table, section.stacked)
        else:
            _print_in_parts(console, section)
        for note in section.notes:
            console.print(note)


def _print_in_parts(console: Console, section: TableSection) -> None:
    without_limit = console.options.update_width(sys.maxsize)
    columns = section.columns
    while columns:
        parts = (columns[:count] for count in range(len(columns), 1, -1))
        part = next(
            (
                part
                for part in parts
                if console.measure(section.table_of(part), options=without_limit).maximum <= console.width
            ),
            columns[:1],
        )
        print_table(console, section.table_of(part), section.stacked)
        columns = columns[len(part) :]
