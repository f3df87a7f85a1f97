"""Several runs compared: memory over time on the same axes, and the changes from one run to another."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memscope.analysis.diff import Change, Difference, diff
from memscope.analysis.effects import Run
from memscope.dashboards.downsample import shown_events
from memscope.dashboards.names import spoken
from memscope.dashboards.palette import LIGHT, SHADE, Theme, dressed, themed
from memscope.dashboards.phases import LABELLED_SHARE, stretches
from memscope.dashboards.timeline import moment, shown_categories, unit_of, views
from memscope.errors import UsageError
from memscope.trace import PHASES, Trace
from memscope.units import format_bytes, format_change

__all__ = ["LEAST_SHARE", "difference", "is_small", "small_multiples"]

LEAST_SHARE = 0.001
"""Changes below this share of the larger peak are left out of figures, and folded on a page."""
_POSITIONS = 600
"""Events shown of each run: about one for each pixel column."""
_MOST_STRETCHES = 300
"""Phases shown of each run."""
_ROW_HEIGHT, _ROW_GAP = 104, 22
_MARGIN_TOP, _MARGIN_BOTTOM = 40, 44
_HEADROOM = 1.36
_PHASES_FROM, _PHASES_TO = -0.10, -0.03
"""Where the bar of phases lies, as shares of the highest peak."""
_SHADED_SHARE = 0.01
_TOP_MODULES = 10
_BAR_HEIGHT = 34
_LONGEST_NAME = 28


def small_multiples(runs: Sequence[Run], theme: Theme = LIGHT) -> go.Figure:
    """Memory over time of several runs, one above the other on the same axes, with peak, steps and phases of each.

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
    plot_height = _ROW_HEIGHT * len(runs) + _ROW_GAP * (len(runs) - 1)
    figure = make_subplots(rows=len(runs), cols=1, shared_xaxes=True, vertical_spacing=_ROW_GAP / plot_height)
    named: set[str] = set()
    for row, run in enumerate(runs, start=1):
        curves = [*_areas(run.trace, row, scale), *_phases(run.trace, highest / scale)]
        for curve in curves:
            curve.showlegend = curve.name not in named
            named.add(curve.name)
        figure.add_traces(curves, rows=row, cols=1)
    figure.update_layout(
        dressed(
            height=plot_height + _MARGIN_TOP + _MARGIN_BOTTOM,
            margin={"l": 56, "r": 12, "t": _MARGIN_TOP, "b": _MARGIN_BOTTOM},
            hovermode=False,
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "itemclick": False},
        )
    )
    axis = {"gridcolor": LIGHT.grid, "zeroline": False, "exponentformat": "none", "separatethousands": True}
    figure.update_xaxes(range=[0, max(run.trace.events for run in runs)], nticks=7, **axis)
    extent = [2 * _PHASES_TO * highest / scale + _PHASES_FROM * highest / scale / 2, highest * _HEADROOM / scale]
    figure.update_yaxes(range=extent, nticks=4, title={"text": unit, "standoff": 4}, **axis)
    figure.update_xaxes(title={"text": "event", "standoff": 6}, row=len(runs), col=1)
    for row, run in enumerate(runs, start=1):
        _mark_steps(figure, row, run.trace)
        _name(figure, row, run, scale)
    return themed(figure, theme)


def _areas(trace: Trace, row: int, scale: int) -> Iterable[go.Scatter]:
    shown = shown_events(trace.allocated, np.array([trace.peak.event], dtype=np.int64), _POSITIONS)
    for category in shown_categories(trace):
        colour = LIGHT.categories[category]
        yield go.Scatter(
            name=spoken(category), x=shown, y=trace.timeline(category)[shown] / scale, mode="lines",
            stackgroup=f"run{row}", fillcolor=colour, line={"width": 0, "shape": "hv", "color": colour},
            hoverinfo="skip",
        )  # fmt: skip


def _phases(trace: Trace, highest: float) -> Iterable[go.Scatter]:
    """The bar of phases under the areas: one curve for each phase, with one rectangle for each of its stretches."""
    found = stretches(trace, _MOST_STRETCHES)
    low, high = _PHASES_FROM * highest, _PHASES_TO * highest
    for phase in np.unique(found.phase).tolist():
        here = found.phase == phase
        first, last = found.first[here].astype(float), found.last[here].astype(float)
        yield go.Scatter(
            name=spoken(PHASES[phase]), fill="toself", fillcolor=LIGHT.phases[PHASES[phase]], mode="lines",
            x=np.stack([first, first, last, last, np.full(first.size, np.nan)], axis=1).reshape(-1),
            y=np.tile([low, high, high, low, np.nan], first.size), hoverinfo="skip", meta="phase",
            line={"width": 0, "color": LIGHT.phases[PHASES[phase]]},
        )  # fmt: skip


def _mark_steps(figure: go.Figure, row: int, trace: Trace) -> None:
    """Shade every second step of a run and name the steps above its plot."""
    place = {"xref": f"x{row if row > 1 else ''}", "yref": f"y{row if row > 1 else ''} domain"}
    longest = figure.layout.xaxis.range[1]
    for index, (label, first, last) in enumerate(views(trace)[1:]):
        share = (last - first) / longest
        if index % 2 == 0 and share >= _SHADED_SHARE:
            figure.add_shape(
                type="rect", x0=first, x1=last, y0=0, y1=1, line_width=0, fillcolor=SHADE, layer="below", **place
            )
        if share >= LABELLED_SHARE:
            figure.add_annotation(
                x=(first + last) / 2, y=1, yanchor="bottom", text=label, showarrow=False, font={"size": 11}, **place
            )


def _name(figure: go.Figure, row: int, run: Run, scale: int) -> None:
    """The name of the run on its plot, and a mark at its peak."""
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
    """The end of a long name, which is more telling than its beginning."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _plain(label: str) -> str:
    """A name without characters that Plotly reads as markup."""
    return label.replace("&", "&amp;").replace("<", "&lt;")


def is_small(change: int, found: Difference) -> bool:
    """Whether a change of so many bytes is below 0.1 % of the larger peak."""
    return abs(change) < LEAST_SHARE * max(found.peak.before, found.peak.after)


class _ChangeBar(NamedTuple):
    name: str
    change: int
    colour: str


def difference(before: Trace, after: Trace, theme: Theme = LIGHT, *, found: Difference | None = None) -> go.Figure:
    """The changes at the peak by category and by module; modules of all layers are counted together.

    Each run is taken at its own peak. Only changes of at least 0.1 % of the larger peak are drawn, and at most ten
    modules.

    Args:
        before: the first run.
        after: the second.
        theme: colours.
        found: the result of `memscope.analysis.diff.diff` for them, if it is known already.

    Raises:
        UsageError: when a trace is empty.
    """
    found = found or diff(before, after)
    categories = [
        _ChangeBar(spoken(name), one.change, LIGHT.categories[name])  # type: ignore[index]  # keys are categories
        for name, one in _large(found.categories, found)
    ]
    modules = [_ChangeBar(_plain(_short(name)), one.change, LIGHT.muted) for name, one in _large(found.modules, found)]
    bars = [*categories, *modules[:_TOP_MODULES]]
    most = max((abs(bar.change) for bar in bars), default=1)
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
                "ticktext": [f"{bar.name}<br><b>{format_change(bar.change)}</b> " for bar in bars],
                "tickfont": {"size": 11},
            },
            showlegend=False,
        )
    )  # fmt: skip
    figure.add_vline(0, line={"color": LIGHT.text, "width": 1})
    if categories and modules:
        figure.add_hline(len(categories) - 0.5, line={"color": LIGHT.grid, "width": 1})
    return themed(figure, theme)


def _large(changes: Mapping[str, Change], found: Difference) -> list[tuple[str, Change]]:
    return [(name, one) for name, one in changes.items() if not is_small(one.change, found)]


def _changes(bars: Sequence[_ChangeBar], scale: int) -> go.Bar:
    return go.Bar(
        orientation="h", y=list(range(len(bars))), x=[bar.change / scale for bar in bars],
        marker={"color": [bar.colour for bar in bars], "line": {"width": 0.5, "color": LIGHT.muted}},
        customdata=[f"{bar.name}: {format_change(bar.change)}" for bar in bars],
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


if __name__ == "__main__":
    small_multiples([Run(name, Trace.load(name)) for name in sys.argv[1:]]).write_html("small_multiples.html")
