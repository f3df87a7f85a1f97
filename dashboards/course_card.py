"""The course of a run as parts of its section: the peak of each phase, and of each step."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from memscope.analysis.growth import MOST_ALIKE, about_steps, chosen_steps, step_peaks
from memscope.analysis.phases import about_phases, call_peaks, leaves_the_steps, phase_peaks
from memscope.dashboards.course import calls_figure, steps_figure
from memscope.dashboards.html import code, figure_box, fold, swatch, table
from memscope.dashboards.names import spoken
from memscope.trace import Trace
from memscope.units import format_bytes

__all__ = ["phases_part", "steps_part"]


def phases_part(trace: Trace, key: str) -> str:
    """The peak of each phase, folded: HTML; empty for a run that has only the phases of training steps.

    Args:
        trace: the run.
        key: id of the part on the page.
    """
    if not leaves_the_steps(trace):
        return ""
    has_reserved = bool(trace.reserved.size)
    rows = [
        [f"{swatch(one.phase)}{spoken(one.phase)}", format_bytes(one.allocated_bytes),
         *([format_bytes(one.reserved_bytes or 0)] if has_reserved else []), one.at]
        for one in phase_peaks(trace)
    ]  # fmt: skip
    headers = ["phase", "allocated", *(["reserved"] if has_reserved else []), "at"]
    body = table(headers, rows, "Peak by phase", "numbers") + _notes(about_phases(trace))
    calls = call_peaks(trace)
    if len(calls) > 1:
        body += figure_box(calls_figure(calls), "Memory of each call of the model without gradients")
    models = trace.meta.get("models", {})
    if len(models) > 1:
        body += table(
            ("model", "class"), [[code(name), escape(kind)] for name, kind in models.items()], "Models", "names"
        )
    return fold(body, key=key, title="Phases", gist="the peak of each")


def steps_part(trace: Trace, key: str) -> str:
    """The peak of each step, and what grows, folded: HTML; empty for a run of few steps.

    Args:
        trace: the run.
        key: id of the part on the page.
    """
    peaks = step_peaks(trace)
    if len(peaks) <= MOST_ALIKE:
        return ""
    has_reserved = bool(trace.reserved.size)
    shown, _ = chosen_steps(trace)
    rows = [
        [f"step {one.step}", format_bytes(one.allocated_bytes),
         *([format_bytes(one.reserved_bytes or 0), format_bytes(one.unused_bytes or 0)] if has_reserved else [])]
        for one in shown
    ]  # fmt: skip
    headers = ["step", "allocated", *(["reserved", "not allocated at the peak"] if has_reserved else [])]
    body = (
        f"{_notes(about_steps(trace))}{figure_box(steps_figure(peaks), 'Peak memory of each step')}"
        f"{table(headers, rows, f'Peak by step ({len(shown)} of {len(peaks):,})', 'numbers')}"
    )
    low, high = (choose(one.allocated_bytes for one in peaks) for choose in (min, max))
    return fold(body, key=key, title="Steps", gist=f"peaks from {format_bytes(low)} to {format_bytes(high)}")


def _notes(texts: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(text)}</p>' for text in texts)
