"""Table 2 on a page: the memory that each combination of strategies needs, and the memory of the device."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from memscope.analysis.grid import Cell, Grid
from memscope.analysis.grid_words import RUNS_OUT, grid_headings, grid_rows, grid_title
from memscope.dashboards.html import Section, card, figure_box, table
from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.dashboards.timeline import unit_of
from memscope.units import format_bytes

__all__ = ["grid_card", "grid_peaks"]

_ROW_HEIGHT = 30
_BAR_WIDTH = 0.64
_LONGEST_NAME = 34
_LIMIT_IN_SIGHT = 3
"""The limit of the device is drawn if it is at most so many times the largest need; a higher limit would flatten the
bars."""


def grid_peaks(grid: Grid, theme: Theme = LIGHT) -> go.Figure:
    """Peak memory of each combination as a bar, with the limit of the device; × marks running out of memory.

    A combination that ran out on a real device, so that its need is unknown, has its × at the limit.
    """
    names = [_name(grid, cell) for cell in grid.cells]
    most = max((size for cell in grid.cells for size in _sizes(cell)), default=0)
    limit = grid.limit_bytes if most == 0 or (grid.limit_bytes or 0) <= _LIMIT_IN_SIGHT * most else None
    unit, scale = unit_of(max(most, limit or 0))
    figure = go.Figure()
    colours = LIGHT.categories["workspace"], LIGHT.categories["gradient"]
    for fits, name, colour in ((True, "allocated", colours[0]), (False, "allocated, does not fit", colours[1])):
        chosen = [index for index, cell in enumerate(grid.cells) if cell.fits == fits and cell.allocated_bytes]
        if chosen:
            sizes = [grid.cells[index].allocated_bytes or 0 for index in chosen]
            figure.add_trace(_bars(name, chosen, sizes, scale, colour))
    reserved = [(index, cell.reserved_bytes) for index, cell in enumerate(grid.cells) if cell.reserved_bytes]
    if reserved:
        figure.add_trace(_marks("reserved", reserved, scale, "line-ns-open", LIGHT.text))
    out = [
        (index, max(_sizes(cell), default=grid.limit_bytes or 0))
        for index, cell in enumerate(grid.cells)
        if cell.fits is False
    ]
    if out:
        figure.add_trace(_marks("runs out of memory", out, scale, "x-thin-open", LIGHT.accent))
    axis = f"{unit}, {'predicted' if grid.predicted else 'measured'}"
    if grid.limit_bytes is not None:
        axis += f"<br>{'dotted: ' if limit else ''}{format_bytes(grid.limit_bytes)} is the limit"
    if limit is not None:
        figure.add_vline(limit / scale, line={"color": LIGHT.accent, "dash": "dot", "width": 1.4})
    figure.update_layout(
        dressed(
            height=126 + _ROW_HEIGHT * len(names),
            margin={"l": 40, "r": 16, "t": 58, "b": 60},
            barmode="overlay",
            xaxis={
                "title": {"text": axis, "standoff": 6},
                "range": [0, max(most, limit or 0, 1) * 1.06 / scale],
            },
            yaxis={
                "tickvals": list(range(len(names))), "ticktext": names, "showgrid": False, "automargin": True,
                "range": [len(names) - 0.5, -0.5],
            },
            legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        )
    )  # fmt: skip
    return themed(figure, theme)


def _sizes(cell: Cell) -> list[int]:
    return [size for size in (cell.allocated_bytes, cell.reserved_bytes) if size is not None]


def _name(grid: Grid, cell: Cell) -> str:
    """`ga + lora`: the strategies that are on, without their settings, which Table 2 has, unless there are several."""
    names = [factor.partition(":")[0] for factor in grid.factors]
    shown = [factor if names.count(name) > 1 else name for factor, name in zip(grid.factors, names, strict=True)]
    name = " + ".join(itertools.compress(shown, cell.applied)) or "none"
    return escape(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…")


def _bars(name: str, rows: Sequence[int], sizes: Sequence[int], scale: int, colour: str) -> go.Bar:
    return go.Bar(
        name=name, orientation="h", width=_BAR_WIDTH, y=list(rows), x=[size / scale for size in sizes],
        customdata=[format_bytes(size) for size in sizes], hovertemplate=f"%{{customdata}} {name}<extra></extra>",
        marker={"color": colour},
    )  # fmt: skip


def _marks(name: str, points: Sequence[tuple[int, int]], scale: int, symbol: str, colour: str) -> go.Scatter:
    return go.Scatter(
        name=name, y=[row for row, _ in points], x=[size / scale for _, size in points], mode="markers",
        marker={"symbol": symbol, "size": 13, "color": colour, "line": {"width": 2.5, "color": colour}},
        customdata=[format_bytes(size) for _, size in points], hovertemplate=f"%{{customdata}} {name}<extra></extra>",
    )  # fmt: skip


def grid_card(grid: Grid, notes: Sequence[str], key: str = "table2") -> Section:
    """Table 2 as a section of a page: the figure, the table, and its notes."""
    how = "predicted" if grid.predicted else "measured"
    label = (
        f"Peak memory of each combination, {how}; {RUNS_OUT} where it runs out of memory. The table below has the same "
        "figures"
    )
    headings = ["combination", *map(escape, grid_headings(grid))]
    rows = [[_name(grid, cell), *map(escape, words)] for cell, words in zip(grid.cells, grid_rows(grid), strict=True)]
    listed = table(headings, rows, f"Every combination, each strategy on (✓) or off (–), {how}", "numbers grid")
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    title = grid_title(grid)
    return Section(key, title, card(figure_box(grid_peaks(grid), label) + listed + told, key=key, title=title))


if __name__ == "__main__":
    gib = 2**30
    cells = (
        Cell((False, False), fits=False, allocated_bytes=58 * gib, reserved_bytes=60 * gib, seconds=None),
        Cell((False, True), fits=False, allocated_bytes=43 * gib, reserved_bytes=44 * gib, seconds=None),
        Cell((True, False), fits=False, allocated_bytes=52 * gib, reserved_bytes=53 * gib, seconds=None),
        Cell((True, True), fits=True, allocated_bytes=31 * gib, reserved_bytes=33 * gib, seconds=120.0),
    )
    made_up = Grid("made-up model", "made-up GPU", True, ("ga:steps=8", "lora"), cells, 200, None, 39 * gib)
    grid_peaks(made_up).write_html(sys.argv[1] if len(sys.argv) > 1 else "grid.html")
