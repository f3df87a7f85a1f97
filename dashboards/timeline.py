"""Memory over time: bytes allocated after each event, stacked by category, with steps, phases and the peak marked."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from memscope.analysis.alive import occasion
from memscope.dashboards.downsample import MOST_POSITIONS, shown_events
from memscope.dashboards.names import spoken
from memscope.dashboards.palette import LIGHT, SHADE, Theme, dressed, themed
from memscope.dashboards.phases import LABELLED_SHARE, phase_curves, stretches
from memscope.trace import CATEGORIES, PHASES, Category, Ints, Peak, Trace
from memscope.units import format_bytes

__all__ = [
    "RESERVED",
    "TOTAL",
    "View",
    "events_to_show",
    "highest_drawn",
    "moment",
    "peak_text",
    "shown_categories",
    "timeline",
    "unit_of",
    "views",
]

TOTAL = "allocated"
"""Name of the curve that sums all categories."""
RESERVED = "reserved"
"""Name of the curve of reserved bytes."""

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_MOST_BUTTONS = 8
"""With more buttons than that, a menu offers the steps."""
_SHADED_SHARE = 0.01
"""Steps narrower than this are not shaded: the shade would be invisible, and a run may have thousands."""
_HEADROOM = 1.14
_LIMIT_IN_SIGHT = 1.5
"""The limit of the device is drawn if it is at most so many times the highest curve; a higher limit would flatten the
curves."""


class View(NamedTuple):
    """A stretch of the run to zoom to: events `first` to `last`."""

    label: str
    first: int
    last: int


def timeline(trace: Trace, theme: Theme = LIGHT, most_positions: int = MOST_POSITIONS) -> go.Figure:
    """The memory timeline of a trace: stacked areas over events, in GiB (MiB or KiB for runs that never reach one GiB).

    Every allocation and every release is an event. Long runs show at most `most_positions` events; the peak is always
    among them, and each value shown is exact. Unused categories are left out. A dashed line shows reserved memory, a
    dotted line the most that the allocator can reserve, if that is near.

    Raises:
        UsageError: when the trace is empty.
    """
    peak = trace.peak
    unit, scale = unit_of(peak.allocated_bytes)
    shown = events_to_show(trace, most_positions)

    figure = go.Figure()
    for category in shown_categories(trace):
        figure.add_trace(_area(category, shown, trace.timeline(category)[shown], scale))
    figure.add_trace(_total(trace, shown, scale))
    if trace.reserved.size:
        figure.add_trace(_reserved(trace, shown, scale))
    figure.add_trace(_peak_marker(peak, scale))
    figure.add_traces(phase_curves(trace, most_positions))
    _lay_out(figure, trace, unit, scale)
    return themed(figure, theme)


def events_to_show(trace: Trace, most: int = MOST_POSITIONS) -> Ints:
    """The events that a timeline shows: starts of phases, peaks of all steps and of reserved memory, and extremes.

    Raises:
        UsageError: when the trace is empty.
    """
    kept = [trace.peak.event, *(trace.peak_of(step).event for step in _lasting_steps(trace))]
    if trace.reserved.size:
        kept.append(int(trace.reserved.argmax()))
    out = trace.meta.get("out_of_memory")
    if out and out["event"] < trace.events:
        kept.append(out["event"])
    return shown_events(trace.allocated, np.union1d(stretches(trace, most).first, kept), most)


def views(trace: Trace) -> tuple[View, ...]:
    """The stretches to offer for zooming: the whole run, then each step."""
    steps = (View(f"step {step}", *trace.step_range(step)) for step in _lasting_steps(trace))
    return (View("whole run", 0, trace.events), *steps)


def _lasting_steps(trace: Trace) -> list[int]:
    """Steps with at least one event: a run stopped by an error may end with an empty step."""
    ranges = ((step, trace.step_range(step)) for step in trace.steps)
    return [step for step, (first, last) in ranges if last > first]


def shown_categories(trace: Trace) -> tuple[Category, ...]:
    """Categories with at least one byte in the trace, in the order of the stack: parameter at the bottom."""
    used = np.unique(trace.category[trace.size > 0])
    return tuple(CATEGORIES[code] for code in used)


def moment(peak: Peak) -> str:
    """`step 1 · backward`: when a peak occurs; before the first step, only the phase."""
    return spoken(occasion(peak.step, peak.phase))


def peak_text(trace: Trace) -> str:
    """`peak 41.2 GiB · step 1 · backward`."""
    return f"peak {format_bytes(trace.peak.allocated_bytes)} · {moment(trace.peak)}"


def unit_of(size_bytes: int) -> tuple[str, int]:
    """The unit in which a size is drawn, and the bytes of that unit."""
    return next((unit for unit in _UNITS if size_bytes >= unit[1]), _UNITS[-1])


def _area(category: Category, shown: Ints, size_bytes: Ints, scale: int) -> go.Scatter:
    return go.Scatter(
        name=spoken(category), x=shown, y=size_bytes / scale,
        customdata=[format_bytes(size) for size in size_bytes.tolist()],
        hoverinfo=["all" if size else "none" for size in size_bytes.tolist()],  # no row for a category of 0 bytes
        hovertemplate="%{customdata}", mode="lines", stackgroup="memory", fillcolor=LIGHT.categories[category],
        line={"width": 0, "shape": "hv", "color": LIGHT.categories[category]},
    )  # fmt: skip


def _total(trace: Trace, shown: Ints, scale: int) -> go.Scatter:
    return go.Scatter(
        name=TOTAL, x=shown, y=trace.allocated[shown] / scale, customdata=_descriptions(trace, shown),
        hovertemplate="%{customdata}", mode="lines", line={"width": 0.8, "shape": "hv", "color": LIGHT.text},
    )  # fmt: skip


def _reserved(trace: Trace, shown: Ints, scale: int) -> go.Scatter:
    size_bytes = trace.reserved[shown]
    return go.Scatter(
        name=RESERVED, x=shown, y=size_bytes / scale, customdata=[format_bytes(size) for size in size_bytes.tolist()],
        hovertemplate="%{customdata}", mode="lines",
        line={"width": 1.2, "dash": "dash", "shape": "hv", "color": LIGHT.muted},
    )  # fmt: skip


def _descriptions(trace: Trace, shown: Ints) -> list[str]:
    """Each event in four lines: bytes allocated after it, the moment, the change, and module and operator."""
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
    phases, categories = [spoken(name) for name in PHASES], [spoken(name) for name in CATEGORIES]
    return [
        f"{format_bytes(total)}<br>{f'step {step}' if step >= 0 else 'before the first step'} · {phases[phase]}"
        f"{f' · micro-batch {micro_batch}' if step >= 0 else ''}"
        f"<br>{'+' if born else '−'}{format_bytes(size)} {categories[category]} {'allocated' if born else 'freed'}"
        f"<br>{modules[module]} · {ops[op]}"
        for total, step, phase, micro_batch, born, size, category, module, op in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


def _peak_marker(peak: Peak, scale: int) -> go.Scatter:
    return go.Scatter(
        name="peak", x=[peak.event], y=[peak.allocated_bytes / scale], mode="markers", hoverinfo="skip",
        showlegend=False, marker={"symbol": "diamond", "size": 9, "color": LIGHT.accent},
    )  # fmt: skip


def _lay_out(figure: go.Figure, trace: Trace, unit: str, scale: int) -> None:
    limit = _limit_in_sight(trace)
    figure.update_layout(
        dressed(
            height=520,
            margin={"l": 56, "r": 12, "t": 68, "b": 44},
            hovermode="x unified",
            dragmode="zoom",
            xaxis={
                "anchor": "y2", "range": [0, trace.events],
                "title": {"text": "each allocation or release is one event", "standoff": 6},
                "hoverformat": ",d", "nticks": 9, "tickangle": 0, "spikecolor": LIGHT.muted,
                # Plotly writes the prefix of the first tick on every hover label too.
                "tickprefix": "event ", "showtickprefix": "first", "spikethickness": 1, "spikedash": "solid",
            },
            yaxis={
                "domain": [0.13, 1], "range": [0, highest_drawn(trace) / scale], "fixedrange": True,
                "title": {"text": unit, "standoff": 4},
            },
            yaxis2={"domain": [0, 0.11], "range": [0, 1.05], "fixedrange": True, "visible": False},
            legend={"traceorder": "reversed", "title": {"text": "category"}, "y": 1, "yanchor": "top"},
            legend2={"title": {"text": "phase"}, "y": 0, "yanchor": "bottom"},
            annotations=[_peak_note(trace, scale)],
        )
    )  # fmt: skip
    _mark_steps(figure, trace)
    if limit is not None:
        _mark_limit(figure, trace, limit, scale)


def highest_drawn(trace: Trace) -> float:
    """Bytes at the upper end of the timeline: above all curves, with room for the note at the peak."""
    highest = max(trace.peak.allocated_bytes, int(trace.reserved.max(initial=0)), _limit_in_sight(trace) or 0)
    return _HEADROOM * (highest or 1)


def _limit_in_sight(trace: Trace) -> int | None:
    """The most that the allocator can reserve, if that is known and not far above the curves."""
    capacity = trace.meta.get("capacity")
    if capacity is None:
        return None
    limit = int(capacity - trace.meta.get("context", 0))
    highest = max(trace.peak.allocated_bytes, int(trace.reserved.max(initial=0)))
    return limit if limit <= _LIMIT_IN_SIGHT * highest else None


def _mark_limit(figure: go.Figure, trace: Trace, limit: int, scale: int) -> None:
    line = {"color": LIGHT.accent, "width": 1.2, "dash": "dot"}
    figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=limit / scale, y1=limit / scale, line=line)
    # Under the line: the note at the peak is always above it or further right.
    figure.add_annotation(
        xref="paper", x=0, xanchor="left", y=limit / scale, yanchor="top", showarrow=False,
        text=f"reserved memory limit: {format_bytes(limit)}", font={"color": LIGHT.accent}, bgcolor=LIGHT.surface,
    )  # fmt: skip
    out = trace.meta.get("out_of_memory")
    if out:
        figure.add_vline(out["event"], line=line)
        figure.add_annotation(
            x=out["event"], yref="paper", y=0.14, yanchor="bottom", text="runs out here", showarrow=False,
            font={"color": LIGHT.accent}, bgcolor=LIGHT.surface,
        )  # fmt: skip


def _peak_note(trace: Trace, scale: int) -> dict[str, object]:
    # Anchored by thirds of the run, so that the text stays inside on a phone.
    anchor = ("left", "center", "right")[min(2, 3 * trace.peak.event // trace.events)]
    return {
        "x": trace.peak.event, "y": trace.peak.allocated_bytes / scale, "text": f"<b>{peak_text(trace)}</b>",
        "xanchor": anchor, "yanchor": "bottom", "ax": 0, "ay": -16, "standoff": 5, "arrowhead": 2,
        "arrowwidth": 1.5, "borderpad": 1, "arrowcolor": LIGHT.accent, "font": {"color": LIGHT.accent},
        "bgcolor": LIGHT.surface,
    }  # fmt: skip


def _mark_steps(figure: go.Figure, trace: Trace) -> None:
    """Shade every second step, name the steps above the plot and offer a zoom to each."""
    offered = views(trace)
    for index, (label, first, last) in enumerate(offered[1:]):
        share = (last - first) / trace.events
        if index % 2 == 0 and share >= _SHADED_SHARE:
            figure.add_shape(
                type="rect", x0=first, x1=last, y0=0, y1=1, yref="paper", line_width=0, fillcolor=SHADE, layer="below"
            )
        if share >= LABELLED_SHARE:
            middle = (first + last) / 2
            figure.add_annotation(x=middle, y=1, yref="paper", yanchor="bottom", text=label, showarrow=False)
    buttons = [
        {"label": label, "method": "relayout", "args": [{"xaxis.range": [first, last]}]}
        for label, first, last in offered
    ]
    menu = {"type": "buttons", "direction": "right"} if len(buttons) <= _MOST_BUTTONS else {"type": "dropdown"}
    place = {"x": 0, "xanchor": "left", "y": 1.06, "yanchor": "bottom"}
    figure.update_layout(updatemenus=[{**menu, **place, "buttons": buttons}])
