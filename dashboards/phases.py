"""The bar under a timeline: the phase of each stretch of the run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from memscope.dashboards.names import spoken
from memscope.dashboards.palette import LIGHT
from memscope.trace import PHASES, Ints, Trace

__all__ = ["LABELLED_SHARE", "PHASE_BAR", "PHASE_LABEL", "PHASE_NAMES", "Stretches", "phase_curves", "stretches"]

LABELLED_SHARE = 0.05
"""Steps and phases of at least this share of the run are named on the plot; narrower ones lack the room."""
PHASE_NAMES = "phase names"
"""Name of the curve that writes the names of phases under their bar; a narrow screen has no room for it."""
PHASE_BAR = (0.55, 1.0, 1.0, 0.55)
"""Heights of the four corners of a bar, on the axis `y2`."""
PHASE_LABEL = 0.25
"""Height of the names, on the axis `y2`."""


class Stretches(NamedTuple):
    """Consecutive phases: int64 `[stretches]`; each lasts from event `first` to event `last`."""

    first: Ints
    last: Ints
    phase: Ints
    step: Ints


def phase_curves(trace: Trace, most: int) -> list[go.Scatter]:
    """One curve for each phase, and one for their names, on the axes `x` and `y2`."""
    found, everything = stretches(trace, most), stretches(trace, trace.events)
    bars = [_phase_bar(found, phase) for phase in np.unique(everything.phase).tolist()]
    return [*bars, _phase_names(found, trace.events)]


def stretches(trace: Trace, most: int) -> Stretches:
    """Phases that last at least one event; if there are more than `most`, those found at `most` even distances.

    Neighbours of the same phase and step are joined.
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
    return Stretches(first, np.append(first[1:], trace.events), phase[new], step[new])


def _phase_bar(found: Stretches, phase: int) -> go.Scatter:
    """All stretches of one phase as one curve: one rectangle each, with gaps between them."""
    here = found.phase == phase
    first, last = found.first[here].astype(float), found.last[here].astype(float)
    x = np.stack([first, first, last, last, np.full(first.size, np.nan)], axis=1).reshape(-1)
    y = np.tile([*PHASE_BAR, np.nan], first.size)
    return go.Scatter(
        name=spoken(PHASES[phase]), x=x, y=y, yaxis="y2", fill="toself", mode="lines",
        fillcolor=LIGHT.phases[PHASES[phase]],
        line={"width": 0, "color": LIGHT.phases[PHASES[phase]]}, hoverinfo="skip", legend="legend2",
    )  # fmt: skip


def _phase_names(found: Stretches, events: int) -> go.Scatter:
    wide = found.last - found.first >= LABELLED_SHARE * events
    return go.Scatter(
        name=PHASE_NAMES, x=(found.first[wide] + found.last[wide]) / 2, y=np.full(int(wide.sum()), PHASE_LABEL),
        text=[spoken(PHASES[phase]) for phase in found.phase[wide].tolist()], yaxis="y2", mode="text", hoverinfo="skip",
        showlegend=False, textfont={"size": 11},
    )  # fmt: skip
