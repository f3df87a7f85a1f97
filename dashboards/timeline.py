"""Memory over time: what is allocated after each event, stacked by category, with steps, phases and the peak marked."""

from __future__ import annotations

import sys
from html import escape
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from memscope.dashboards.downsample import MOST_POSITIONS, shown_events
from memscope.dashboards.palette import LIGHT, SHADE, Theme, theme_update
from memscope.trace import CATEGORIES, PHASES, Category, Peak, Trace
from memscope.units import format_bytes

__all__ = ["PHASE_NAMES", "TOTAL", "View", "moment", "peak_text", "shown_categories", "timeline", "views"]

TOTAL = "allocated"
"""Name of the curve that sums all categories."""

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_LABELLED_SHARE = 0.05
"""Steps and phases of at least this share of the run are named on the plot; the rest have no room for it."""
PHASE_NAMES = "phase names"
"""Name of the curve that writes the phases' names under their bar; a narrow screen has no room for it."""
_MOST_BUTTONS = 8
"""More steps than that are offered in a menu."""
_SHADED_SHARE = 0.01
"""Steps narrower than this are not shaded: nobody would see it, and a run may have thousands."""
_BAR_TOP, _BAR_BOTTOM, _LABEL_HEIGHT = 1.0, 0.55, 0.25

Ints = npt.NDArray[np.int64]


class View(NamedTuple):
    """A stretch of the run to zoom to: events `first` to `last`."""

    label: str
    first: int
    last: int


class _Segments(NamedTuple):
    """The phases as they follow each other: int64 `[segments]`; each lasts from event `first` to `last`."""

    first: Ints
    last: Ints
    phase: Ints
    step: Ints


def timeline(trace: Trace, theme: Theme = LIGHT, most_positions: int = MOST_POSITIONS) -> go.Figure:
    """The memory timeline of a trace: stacked areas over events, in GiB (MiB or KiB for runs that never reach one GiB).

    Every birth and death of an allocation is an event. Long runs show at most `most_positions` of them; the peak is
    always among them, and each value shown is exact. Categories that are never used are left out.

    Raises:
        UsageError: when the trace is empty.
    """
    peak = trace.peak
    unit, scale = _unit(peak.allocated_bytes)
    segments = _segments(trace, most_positions)
    peaks = [peak.event, *(trace.peak_of(step).event for step in _lasting_steps(trace))]
    shown = shown_events(trace.allocated, np.union1d(segments.first, peaks), most_positions)

    figure = go.Figure()
    for category in shown_categories(trace):
        figure.add_trace(_area(category, shown, trace.timeline(category)[shown], scale))
    figure.add_trace(_total(trace, shown, scale))
    figure.add_trace(_peak_marker(peak, scale))
    for phase in np.unique(segments.phase):
        figure.add_trace(_phase_bar(segments, int(phase)))
    figure.add_trace(_phase_names(segments, trace.events))
    _lay_out(figure, trace, unit, scale)
    _paint(figure, theme)
    return figure


def views(trace: Trace) -> tuple[View, ...]:
    """What a reader may want to zoom to: the whole run, then each step."""
    steps = (View(f"step {step}", *trace.step_range(step)) for step in _lasting_steps(trace))
    return (View("whole run", 0, trace.events), *steps)


def _lasting_steps(trace: Trace) -> list[int]:
    """Steps with at least one event: a run stopped by an error may end with a step in which nothing happened."""
    ranges = ((step, trace.step_range(step)) for step in trace.steps)
    return [step for step, (first, last) in ranges if last > first]


def shown_categories(trace: Trace) -> tuple[Category, ...]:
    """Categories with at least one byte in the trace, in the order of the stack: parameter at the bottom."""
    used = np.unique(trace.category[trace.size > 0])
    return tuple(CATEGORIES[code] for code in used)


def moment(peak: Peak) -> str:
    """`step 1 · backward`: when a peak is; memory at its highest before the first step has no step."""
    return peak.phase if peak.step < 0 else f"step {peak.step} · {peak.phase}"


def peak_text(trace: Trace) -> str:
    """`peak 41.2 GiB · step 1 · backward`."""
    return f"peak {format_bytes(trace.peak.allocated_bytes)} · {moment(trace.peak)}"


def _unit(size_bytes: int) -> tuple[str, int]:
    return next((unit for unit in _UNITS if size_bytes >= unit[1]), _UNITS[-1])


def _segments(trace: Trace, most: int) -> _Segments:
    """Phases that last at least one event; of more than `most` only those found at `most` even distances.

    Neighbours alike in phase and step are joined.
    """
    first = np.clip(trace.mark_event, 0, trace.events)
    first[:1] = 0  # `Trace.mark_at` counts events before the first mark to it
    lasting = np.append(first[1:], trace.events) > first
    first, phase, step = first[lasting], trace.mark_phase[lasting], trace.mark_step[lasting]
    if first.size > most:
        places = np.linspace(0, trace.events, most, endpoint=False).astype(np.int64)
        found = np.unique(np.searchsorted(first, places, side="right") - 1)
        first, phase, step = first[found], phase[found], step[found]
    new = np.ones(first.size, dtype=bool)
    new[1:] = (phase[1:] != phase[:-1]) | (step[1:] != step[:-1])
    first = first[new]
    return _Segments(first, np.append(first[1:], trace.events), phase[new], step[new])


def _area(category: Category, shown: Ints, size_bytes: Ints, scale: int) -> go.Scatter:
    return go.Scatter(
        name=category, x=shown, y=size_bytes / scale, customdata=[format_bytes(size) for size in size_bytes.tolist()],
        hovertemplate="%{customdata}", mode="lines", line={"width": 0, "shape": "hv"}, stackgroup="memory",
    )  # fmt: skip


def _total(trace: Trace, shown: Ints, scale: int) -> go.Scatter:
    return go.Scatter(
        name=TOTAL, x=shown, y=trace.allocated[shown] / scale, customdata=_descriptions(trace, shown),
        hovertemplate="%{customdata}", mode="lines", line={"width": 0.8, "shape": "hv"},
    )  # fmt: skip


def _descriptions(trace: Trace, shown: Ints) -> list[str]:
    """What happened at each event, in four lines: bytes allocated after it, the moment, the change, module and op."""
    row = np.empty(trace.events, dtype=np.int64)
    row[trace.born] = np.arange(len(trace))
    died = np.flatnonzero(trace.freed >= 0)
    row[trace.freed[died]] = died
    row = row[shown]
    mark = np.clip(np.searchsorted(trace.mark_event, shown, side="right") - 1, 0, None)
    modules, ops = [escape(name) for name in trace.modules], [escape(name) for name in trace.ops]
    columns = (
        trace.allocated[shown], trace.mark_step[mark], trace.mark_phase[mark], trace.mark_micro_batch[mark],
        trace.born[row] == shown, trace.size[row], trace.category[row], trace.module[row], trace.op[row],
    )  # fmt: skip
    return [
        f"{format_bytes(total)}<br>{f'step {step}' if step >= 0 else 'before the first step'} · {PHASES[phase]}"
        f"{f' · micro-batch {micro_batch}' if step >= 0 else ''}"
        f"<br>{'+' if born else '−'}{format_bytes(size)} {CATEGORIES[category]} {'allocated' if born else 'freed'}"
        f"<br>{modules[module]} · {ops[op]}"
        for total, step, phase, micro_batch, born, size, category, module, op in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


def _peak_marker(peak: Peak, scale: int) -> go.Scatter:
    return go.Scatter(
        name="peak", x=[peak.event], y=[peak.allocated_bytes / scale], mode="markers", hoverinfo="skip",
        showlegend=False, marker={"symbol": "diamond", "size": 9},
    )  # fmt: skip


def _phase_bar(segments: _Segments, phase: int) -> go.Scatter:
    """All stretches of one phase as one curve: a rectangle each, with gaps between them."""
    here = segments.phase == phase
    first, last = segments.first[here].astype(float), segments.last[here].astype(float)
    x = np.stack([first, first, last, last, np.full(first.size, np.nan)], axis=1).reshape(-1)
    y = np.tile([_BAR_BOTTOM, _BAR_TOP, _BAR_TOP, _BAR_BOTTOM, np.nan], first.size)
    return go.Scatter(
        name=PHASES[phase], x=x, y=y, yaxis="y2", fill="toself", mode="lines", line={"width": 0}, hoverinfo="skip",
        legend="legend2",
    )  # fmt: skip


def _phase_names(segments: _Segments, events: int) -> go.Scatter:
    wide = segments.last - segments.first >= _LABELLED_SHARE * events
    return go.Scatter(
        name=PHASE_NAMES, x=(segments.first[wide] + segments.last[wide]) / 2, y=np.full(int(wide.sum()), _LABEL_HEIGHT),
        text=[PHASES[phase] for phase in segments.phase[wide].tolist()], yaxis="y2", mode="text", hoverinfo="skip",
        showlegend=False, textfont={"size": 11},
    )  # fmt: skip


def _lay_out(figure: go.Figure, trace: Trace, unit: str, scale: int) -> None:
    figure.update_layout(
        template="none",
        height=520,
        margin={"l": 56, "r": 12, "t": 68, "b": 44},
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="x unified",
        hoverlabel={"namelength": -1, "align": "left"},
        dragmode="zoom",
        xaxis={
            "anchor": "y2", "range": [0, trace.events],
            "title": {"text": "each allocation or release is one event", "standoff": 6},
            "exponentformat": "none", "separatethousands": True, "hoverformat": ",d", "zeroline": False,
            "nticks": 9, "tickangle": 0,
            # Plotly writes the prefix of the first tick on every hover label too.
            "tickprefix": "event ", "showtickprefix": "first", "spikethickness": 1, "spikedash": "solid",
        },
        yaxis={
            "domain": [0.13, 1], "range": [0, trace.peak.allocated_bytes * 1.14 / scale], "fixedrange": True,
            "title": {"text": unit, "standoff": 4}, "exponentformat": "none", "separatethousands": True,
            "zeroline": False,
        },
        yaxis2={"domain": [0, 0.11], "range": [0, 1.05], "fixedrange": True, "visible": False},
        legend={"traceorder": "reversed", "title": {"text": "category"}, "y": 1, "yanchor": "top"},
        legend2={"title": {"text": "phase"}, "y": 0, "yanchor": "bottom"},
        annotations=[_peak_note(trace, scale)],
    )  # fmt: skip
    _mark_steps(figure, trace)


def _peak_note(trace: Trace, scale: int) -> dict[str, object]:
    # Anchored by thirds of the run, so that the text stays inside on a phone.
    anchor = ("left", "center", "right")[min(2, 3 * trace.peak.event // trace.events)]
    return {
        "x": trace.peak.event, "y": trace.peak.allocated_bytes / scale, "text": f"<b>{peak_text(trace)}</b>",
        "xanchor": anchor, "yanchor": "bottom", "ax": 0, "ay": -16, "standoff": 5, "arrowhead": 2,
        "arrowwidth": 1.5, "borderpad": 1,
    }  # fmt: skip


def _mark_steps(figure: go.Figure, trace: Trace) -> None:
    """Shade every second step, name them above the plot and offer a zoom to each."""
    stretches = views(trace)
    for index, (label, first, last) in enumerate(stretches[1:]):
        share = (last - first) / trace.events
        if index % 2 == 0 and share >= _SHADED_SHARE:
            figure.add_shape(
                type="rect", x0=first, x1=last, y0=0, y1=1, yref="paper", line_width=0, fillcolor=SHADE, layer="below"
            )
        if share >= _LABELLED_SHARE:
            middle = (first + last) / 2
            figure.add_annotation(x=middle, y=1, yref="paper", yanchor="bottom", text=label, showarrow=False)
    buttons = [
        {"label": label, "method": "relayout", "args": [{"xaxis.range": [first, last]}]}
        for label, first, last in stretches
    ]
    menu = {"type": "buttons", "direction": "right"} if len(buttons) <= _MOST_BUTTONS else {"type": "dropdown"}
    place = {"x": 0, "xanchor": "left", "y": 1.06, "yanchor": "bottom"}
    figure.update_layout(updatemenus=[{**menu, **place, "buttons": buttons}])


def _paint(figure: go.Figure, theme: Theme) -> None:
    data, layout = theme_update([curve.name for curve in figure.data], theme)
    for key, colours in data.items():
        for curve, colour in zip(figure.data, colours, strict=True):
            curve[key] = colour
    for key, value in layout.items():
        figure.layout[key] = value


if __name__ == "__main__":
    from memscope.dashboards.demo import write_page

    write_page(sys.argv[1:])
