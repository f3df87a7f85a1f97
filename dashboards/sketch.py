"""The memory timeline as a still picture with axes and units, shown before any script runs and where none may run."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from memscope.dashboards.downsample import shown_events
from memscope.dashboards.names import spoken
from memscope.dashboards.phases import LABELLED_SHARE, stretches
from memscope.dashboards.timeline import highest_drawn, peak_text, shown_categories, unit_of, views
from memscope.trace import PHASES, Ints, Trace

__all__ = ["sketch"]

_POSITIONS = 250
_WIDTH, _HEIGHT = 1000, 1000
"""Coordinates of the picture; the page stretches them over the axes of the figure that replaces it."""
_TICKS = 6
"""At most so many labels on an axis."""


def sketch(trace: Trace) -> str:
    """The areas of `timeline` as SVG in the colours of the page, with its axes, its phases and its peak in words: HTML.

    Raises:
        UsageError: when the trace is empty.
    """
    peak = trace.peak
    shown = shown_events(trace.allocated, np.array([peak.event]), _POSITIONS)
    x = np.round(np.append(shown, trace.events) * _WIDTH / trace.events).astype(np.int64)
    top = highest_drawn(trace)
    upper = np.zeros(shown.size, dtype=np.int64)
    paths = []
    for category in shown_categories(trace):
        upper = upper + trace.timeline(category)[shown]
        y = np.round(_HEIGHT * (1 - upper / top)).astype(np.int64)
        paths.append(f'<path fill="var(--{category})" d="{_steps(x, y)}"/>')
    left, height = 100 * peak.event / trace.events, 100 * peak.allocated_bytes / top
    return (
        f'<div class="sketch" aria-hidden="true">{_axes(trace, top)}'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none">'
        # Each area reaches down to the axis; the lower ones are painted over the upper ones.
        f"{''.join(reversed(paths))}</svg>"
        f'<b style="--left:{left:.2f}%;--up:{height:.2f}%">{peak_text(trace)}</b></div>{_phases(trace)}'
    )


def _axes(trace: Trace, top: float) -> str:
    """Ticks of both axes with their units, and the names of steps."""
    unit, scale = unit_of(trace.peak.allocated_bytes)
    sizes = "".join(
        f'<i class="tick" style="--up:{100 * value * scale / top:.2f}%">{value:,g}</i>' for value in _ticks(top / scale)
    )
    events = "".join(
        f'<i class="event" style="--left:{100 * value / trace.events:.2f}%">{"" if value else "event "}{value:,g}</i>'
        for value in _ticks(trace.events)
    )
    steps = "".join(
        f'<i class="step" style="--left:{50 * (view.first + view.last) / trace.events:.2f}%">{escape(view.label)}</i>'
        for view in views(trace)[1:]
        if view.last - view.first >= LABELLED_SHARE * trace.events
    )
    return f'<i class="unit">{unit}</i>{sizes}{events}{steps}'


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at most `highest`: multiples of 1, 2 or 5 times a power of ten."""
    rough = highest / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(index * step, 9) for index in range(int(highest / step) + 1)]


def _phases(trace: Trace) -> str:
    """The bar of phases under the areas."""
    found = stretches(trace, _POSITIONS)
    bars = "".join(
        f'<rect fill="var(--{PHASES[phase]})" x="{_WIDTH * first / trace.events:.1f}" y="0" '
        f'width="{_WIDTH * (last - first) / trace.events:.1f}" height="1"/>'
        for first, last, phase in zip(found.first.tolist(), found.last.tolist(), found.phase.tolist(), strict=True)
    )
    names = "".join(
        f'<i style="--left:{50 * (first + last) / trace.events:.2f}%">{spoken(PHASES[phase])}</i>'
        for first, last, phase in zip(found.first.tolist(), found.last.tolist(), found.phase.tolist(), strict=True)
        if last - first >= LABELLED_SHARE * trace.events
    )
    return (
        f'<div class="sketched-phases" aria-hidden="true"><svg viewBox="0 0 {_WIDTH} 1" preserveAspectRatio="none">'
        f"{bars}</svg>{names}</div>"
    )


def _steps(x: Ints, y: Ints) -> str:
    """A path that keeps each height until the next position, then falls to the axis; repeated points are left out."""
    parts, last = [f"M{x[0]},{_HEIGHT}"], (-1, -1)
    for right, height in zip(x[1:].tolist(), y.tolist(), strict=True):
        if height != last[1]:
            parts.append(f"V{height}")
        if right != last[0]:
            parts.append(f"H{right}")
        last = (right, height)
    return f"{''.join(parts)}V{_HEIGHT}z"
