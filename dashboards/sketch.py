"""The memory timeline as a still picture, there before any script has run and where none may."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memscope.dashboards.downsample import shown_events
from memscope.dashboards.timeline import highest_drawn, peak_text, shown_categories
from memscope.trace import Trace

__all__ = ["sketch"]

_POSITIONS = 250
_WIDTH, _HEIGHT = 1000, 1000
"""Of the picture's own coordinates; the page stretches them over the axes of the figure that takes its place."""

Ints = npt.NDArray[np.int64]


def sketch(trace: Trace) -> str:
    """The areas of `timeline` as SVG in the colours of the page, and its peak in words: HTML.

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
        f'<div class="sketch" aria-hidden="true"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none">'
        # Each area reaches down to the axis; the lower ones are painted over the upper ones.
        f'{"".join(reversed(paths))}</svg><b style="--left:{left:.2f}%;--up:{height:.2f}%">{peak_text(trace)}</b></div>'
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
