"""The peak of each step of a run, as a curve."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from memscope.analysis.growth import StepPeak
from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.dashboards.timeline import unit_of
from memscope.units import format_bytes

__all__ = ["steps_figure"]


def steps_figure(peaks: Sequence[StepPeak], theme: Theme = LIGHT) -> go.Figure:
    """Peak allocated and, where there is an allocator, peak reserved memory over the steps.

    Args:
        peaks: at least one, as `memscope.analysis.growth.step_peaks` gives them.
        theme: colours.
    """
    highest = max(max(one.allocated_bytes, one.reserved_bytes or 0) for one in peaks)
    unit, scale = unit_of(highest)
    steps = [one.step for one in peaks]
    figure = go.Figure(_curve("peak allocated", steps, [one.allocated_bytes for one in peaks], scale, LIGHT.text))
    reserved = [one.reserved_bytes for one in peaks if one.reserved_bytes is not None]
    if reserved:
        figure.add_trace(_curve("peak reserved", steps, reserved, scale, LIGHT.muted))
    figure.update_layout(
        dressed(
            height=240,
            margin={"l": 56, "r": 12, "t": 34, "b": 44},
            hovermode="x unified",
            xaxis={"title": {"text": "step", "standoff": 6}, "nticks": 7, "hoverformat": ",d"},
            yaxis={"title": {"text": unit, "standoff": 4}, "range": [0, max(highest, 1) * 1.08 / scale]},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        )
    )
    return themed(figure, theme)


def _curve(name: str, steps: Sequence[int], sizes: Sequence[int], scale: int, colour: str) -> go.Scatter:
    return go.Scatter(
        name=name, x=list(steps), y=[size / scale for size in sizes], mode="lines", line={"color": colour, "width": 2},
        customdata=[format_bytes(size) for size in sizes], hovertemplate="%{customdata}",
    )  # fmt: skip
