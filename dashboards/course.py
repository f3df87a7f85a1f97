"""The peak of each step of a run, and the memory of each call without gradients, as curves."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from memscope.analysis.growth import StepPeak
from memscope.analysis.phases import CallPeak
from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.dashboards.timeline import unit_of
from memscope.units import format_bytes

__all__ = ["calls_figure", "steps_figure"]


def steps_figure(peaks: Sequence[StepPeak], theme: Theme = LIGHT) -> go.Figure:
    """Peak allocated and, where there is an allocator, peak reserved memory over the steps.

    Args:
        peaks: at least one, as `memscope.analysis.growth.step_peaks` gives them.
        theme: colours.
    """
    highest = max(max(one.allocated_bytes, one.reserved_bytes or 0) for one in peaks)
    unit, scale = unit_of(highest)
    steps = [one.step for one in peaks]
    curves = [_curve("peak allocated", steps, [one.allocated_bytes for one in peaks], scale, LIGHT.text)]
    reserved = [one.reserved_bytes for one in peaks if one.reserved_bytes is not None]
    if reserved:
        curves.append(_curve("peak reserved", steps, reserved, scale, LIGHT.muted))
    return themed(_figure(curves, "step", unit, highest / scale), theme)


def calls_figure(calls: Sequence[CallPeak], theme: Theme = LIGHT) -> go.Figure:
    """Memory over the calls of a model without gradients, such as one for each generated token: held, and at the peak.

    Args:
        calls: at least one, as `memscope.analysis.phases.call_peaks` gives them.
        theme: colours.
    """
    unit, scale = unit_of(max(one.allocated_bytes for one in calls))
    numbers = range(1, len(calls) + 1)
    peaks, held = [one.allocated_bytes for one in calls], [one.held_bytes for one in calls]
    curves = [
        _curve("peak of the call", numbers, peaks, scale, LIGHT.text),
        _curve("held before it", numbers, held, scale, LIGHT.accent),
    ]
    return themed(_figure(curves, "call of the model", unit, max(peaks) / scale), theme)


def _figure(curves: Sequence[go.Scatter], title: str, unit: str, highest: float) -> go.Figure:
    figure = go.Figure(list(curves))
    figure.update_layout(
        dressed(
            height=240,
            margin={"l": 56, "r": 12, "t": 34, "b": 44},
            hovermode="x unified",
            xaxis={"title": {"text": title, "standoff": 6}, "nticks": 7, "hoverformat": ",d"},
            yaxis={"title": {"text": unit, "standoff": 4}, "range": [0, (highest or 1) * 1.08]},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        )
    )
    return figure


def _curve(name: str, steps: Sequence[int], sizes: Sequence[int], scale: int, colour: str) -> go.Scatter:
    return go.Scatter(
        name=name, x=list(steps), y=[size / scale for size in sizes], mode="lines", line={"color": colour, "width": 2},
        customdata=[format_bytes(size) for size in sizes], hovertemplate="%{customdata}",
    )  # fmt: skip
