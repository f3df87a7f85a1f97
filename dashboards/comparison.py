"""Several runs side by side: the same axes for all, and what grew and what shrank from one to another."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memscope.analysis.diff import Difference, diff
from memscope.analysis.effects import Run
from memscope.dashboards.downsample import shown_events
from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.dashboards.timeline import moment, shown_categories, unit_of
from memscope.errors import UsageError
from memscope.trace import Category, Trace
from memscope.units import format_bytes, format_change

__all__ = ["difference", "small_multiples"]

_POSITIONS = 600
"""Events shown of each run: a small picture is as many pixels wide."""
_ROW_HEIGHT = 150
_TOP_MODULES = 10
_BAR_HEIGHT = 36
_LONGEST_NAME = 28


def small_multiples(runs: Sequence[Run], theme: Theme = LIGHT) -> go.Figure:
    """Memory over time of several runs, one above the other, on the same axes; each with its peak.

    Args:
        runs: at least one.
        theme: colours.

    Raises:
        UsageError: when there is no run, or a trace is empty.
    """
    if not runs:
        raise UsageError("small multiples need at least one trace: none was given")
    highest = max(run.trace.peak.allocated_bytes for run in runs)
    unit, scale = unit_of(highest)
    figure = make_subplots(rows=len(runs), cols=1, shared_xaxes=True, vertical_spacing=0.3 / len(runs) / 2)
    named: set[Category] = set()
    for row, trace in enumerate((run.trace for run in runs), start=1):
        marks = np.array([trace.peak.event], dtype=np.int64)
        shown = shown_events(trace.allocated, marks, _POSITIONS)
        for category in shown_categories(trace):
            sizes = trace.timeline(category)[shown]
            area = go.Scatter(
                name=category, x=shown, y=sizes / scale, mode="lines", stackgroup=f"run{row}",
                fillcolor=LIGHT.categories[category],
                line={"width": 0, "shape": "hv", "color": LIGHT.categories[category]}, legendgroup=category,
                showlegend=category not in named, hoverinfo="skip",
            )  # fmt: skip
            figure.add_trace(area, row=row, col=1)
            named.add(category)
    longest = max(run.trace.events for run in runs)
    figure.update_layout(
        dressed(
            height=90 + _ROW_HEIGHT * len(runs),
            margin={"l": 56, "r": 12, "t": 40, "b": 44},
            hovermode=False,
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "itemclick": False},
        )
    )
    axis = {"gridcolor": LIGHT.grid, "zeroline": False, "exponentformat": "none", "separatethousands": True}
    figure.update_xaxes(range=[0, longest], nticks=7, **axis)
    figure.update_yaxes(range=[0, highest * 1.3 / scale], nticks=4, title={"text": unit, "standoff": 4}, **axis)
    figure.update_xaxes(title={"text": "event", "standoff": 6}, row=len(runs), col=1)
    for row, run in enumerate(runs, start=1):
        _name(figure, row, run, scale)
    return themed(figure, theme)


def _name(figure: go.Figure, row: int, run: Run, scale: int) -> None:
    """The run's name on its picture, and a mark at its peak."""
    peak = run.trace.peak
    figure.add_trace(
        go.Scatter(
            x=[peak.event], y=[peak.allocated_bytes / scale], mode="markers", hoverinfo="skip", showlegend=False,
            marker={"symbol": "diamond", "size": 7, "color": LIGHT.accent},
        ), row=row, col=1,
    )  # fmt: skip
    text = f"<b>{_plain(run.label)}</b>  peak {format_bytes(peak.allocated_bytes)}, {moment(peak)}"
    figure.add_annotation(
        text=text, xref="x domain", yref="y domain", x=0.01, y=1, xanchor="left", yanchor="top", showarrow=False,
        row=row, col=1, font={"color": LIGHT.text}, bgcolor=LIGHT.surface, opacity=0.9,
    )  # fmt: skip


def _short(name: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _plain(label: str) -> str:
    """A name without what plotly would take for markup."""
    return label.replace("&", "&amp;").replace("<", "&lt;")


def difference(before: Trace, after: Trace, theme: Theme = LIGHT, *, found: Difference | None = None) -> go.Figure:
    """What grew and what shrank at the peak, by category and by module; layers are counted together.

    Each run is taken at its own peak. The categories sum to the difference of the peaks; of the modules the largest
    changes are shown.

    Args:
        before: the first run.
        after: the second.
        theme: colours.
        found: what `memscope.analysis.diff.diff` found between them, if it is there.

    Raises:
        UsageError: when a trace is empty.
    """
    found = found or diff(before, after)
    categories = {name: one.change for name, one in found.categories.items()}
    modules = [(name, one.change) for name, one in found.modules.items()][:_TOP_MODULES]
    colours: dict[str, str] = dict(LIGHT.categories.items())
    bars = [(name, change, colours[name]) for name, change in categories.items()]
    bars += [(_plain(_short(name)), change, LIGHT.muted) for name, change in modules]
    most = max((abs(change) for _, change, _ in bars), default=1)
    unit, scale = unit_of(most)
    figure = go.Figure(_changes(bars, scale))
    figure.update_layout(
        dressed(
            height=70 + _BAR_HEIGHT * max(len(bars), 1),
            margin={"l": 60, "r": 12, "t": 12, "b": 44},
            xaxis={
                "title": {"text": f"{unit} less (left) or more (right)", "standoff": 6}, "nticks": 7,
                "range": [-most * 1.05 / scale, most * 1.05 / scale],
            },
            yaxis={
                "autorange": "reversed", "showgrid": False, "tickvals": list(range(len(bars))), "automargin": True,
                "ticktext": [f"{name}<br><b>{format_change(change)}</b> " for name, change, _ in bars],
                "tickfont": {"size": 11},
            },
            showlegend=False,
        )
    )  # fmt: skip
    figure.add_vline(0, line={"color": LIGHT.text, "width": 1})
    if categories and modules:
        figure.add_hline(len(categories) - 0.5, line={"color": LIGHT.grid, "width": 1})
    return themed(figure, theme)


def _changes(bars: Sequence[tuple[str, int, str]], scale: int) -> go.Bar:
    return go.Bar(
        orientation="h", y=list(range(len(bars))), x=[change / scale for _, change, _ in bars],
        marker={"color": [colour for _, _, colour in bars], "line": {"width": 0.5, "color": LIGHT.muted}},
        customdata=[f"{name}: {format_change(change)}" for name, change, _ in bars],
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


if __name__ == "__main__":
    small_multiples([Run(name, Trace.load(name)) for name in sys.argv[1:]]).write_html("small_multiples.html")
