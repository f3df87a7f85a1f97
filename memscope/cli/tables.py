"""Tables on a terminal of any width: one that does not fit is stacked, as blocks of lines `name  value`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["NARROW", "Direction", "StackedBlock", "is_narrow", "print_table"]

NARROW = 70
"""Columns below which a terminal shows no table."""
_BORDER, _BESIDE_A_COLUMN = 1, 3
"""Characters of a table beside its cells: the left border; two of padding and a border a column."""
Direction: TypeAlias = Literal["rows", "columns"]
"""What becomes a block of lines. `rows`: each row, for lists of things that have several figures each. `columns`: each
column after the first, for comparisons of runs, one run after the other."""


@dataclass(frozen=True)
class StackedBlock:
    """A heading, and lines `name  value` below it."""

    heading: RenderableType
    lines: Sequence[tuple[RenderableType, RenderableType]]
    style: str = ""


def is_narrow(console: Console) -> bool:
    """Whether every table is stacked on this terminal."""
    return console.width < NARROW


def print_table(
    console: Console, table: Table, direction: Direction = "rows", blocks: Iterable[StackedBlock] | None = None
) -> None:
    """Print a table; stacked where the terminal is narrow, or the table would break a word.

    `blocks` replace those that `direction` makes of the table.
    """
    if is_narrow(console) or not _fits(table, console.width):
        _print_stacked(console, table, _blocks_of(table, direction) if blocks is None else blocks)
    else:
        console.print(table)


def _fits(table: Table, columns: int) -> bool:
    """Give each column of the table a width at which no word is broken; whether that is possible."""
    whole = [max(map(_length, (column.header, *column.cells))) for column in table.columns]
    words = [max(map(_longest_word, (column.header, *column.cells))) for column in table.columns]
    widths = [
        length if column.no_wrap else word for column, length, word in zip(table.columns, whole, words, strict=True)
    ]
    room = columns - sum(widths) - _BORDER - _BESIDE_A_COLUMN * len(widths)
    if room < 0:
        return False
    for _ in range(room):  # a character more for the column that lacks most
        lacking = [length - width for length, width in zip(whole, widths, strict=True)]
        widest = lacking.index(max(lacking))
        widths[widest] += lacking[widest] > 0
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    return True


def _print_stacked(console: Console, table: Table, blocks: Iterable[StackedBlock]) -> None:
    if table.title:
        console.print(Text(str(table.title), style="bold italic"))
    for block in blocks:
        if str(block.heading):
            console.print(block.heading, style=f"bold {block.style}".strip())
        names = max((len(str(name)) for name, _ in block.lines), default=0)
        for name, value in block.lines:
            console.print(Padding(_line(name, value, names, console.width), (0, 0, 0, 2)), style=block.style)
    if table.caption:
        console.print(table.caption, style="dim italic")
    console.print()


def _line(name: RenderableType, value: RenderableType, names: int, columns: int) -> RenderableType:
    """`name  value`, the value in line with those of other names; on a line of its own if a word of it is too long."""
    if _longest_word(value) > columns - names - 4:
        return Group(name, Padding(value, (0, 0, 0, 2)))
    line = Table.grid(padding=(0, 2))
    line.add_column(width=names)
    line.add_column(overflow="fold")
    line.add_row(name, value)
    return line


def _length(cell: RenderableType) -> int:
    return len(str(cell))


def _longest_word(cell: RenderableType) -> int:
    return max(map(len, str(cell).split()), default=0)


def _blocks_of(table: Table, direction: Direction) -> Iterable[StackedBlock]:
    names, *others = table.columns
    if direction == "columns":
        for column in others:
            yield StackedBlock(column.header, _filled(zip(names.cells, column.cells, strict=True)))
        return
    headings = [column.header for column in others]
    for row, (name, *values) in enumerate(zip(*(column.cells for column in table.columns), strict=True)):
        style = str(table.rows[row].style or "")
        yield StackedBlock(name, _filled(zip(headings, values, strict=True)), style)


def _filled(lines: Iterable[tuple[RenderableType, RenderableType]]) -> list[tuple[RenderableType, RenderableType]]:
    return [(name, value) for name, value in lines if str(value)]
