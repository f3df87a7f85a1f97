"""What a page holds of a run's curves for a reader who zooms in, and its still picture."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from traces import TraceBuilder, random_traces

from memscope.dashboards.demo import training_run
from memscope.dashboards.detail import curve_data, events_to_hold
from memscope.dashboards.names import spoken
from memscope.dashboards.sketch import sketch
from memscope.dashboards.timeline import events_to_show
from memscope.trace import CATEGORIES, Trace


@settings(deadline=None)
@given(trace=random_traces(), most=st.integers(8, 40))
def test_what_is_shown_at_first_and_the_peak_are_always_held(trace: Trace, most: int) -> None:
    assume(trace.events)
    shown = events_to_show(trace, 8)
    held = events_to_hold(trace, shown, most)
    assert set(shown.tolist()) <= set(held.tolist())
    assert trace.peak.event in held
    assert len(held) <= most + len(shown)


def test_a_short_run_is_held_whole_and_a_long_one_around_its_peak() -> None:
    trace = training_run(layers=4, micro_batches=8)
    peak = trace.peak.event
    shown = events_to_show(trace, 100)
    assert events_to_hold(trace, shown, trace.events).tolist() == list(range(trace.events))
    held = set(events_to_hold(trace, shown, 400).tolist())
    assert trace.events > 1000
    # One eighth of 400 on either side.
    assert set(range(peak - 50, peak + 51)) <= held


@settings(deadline=None)
@given(trace=random_traces())
def test_the_curves_can_be_had_back_from_the_page(trace: Trace) -> None:
    assume(trace.events)
    held = events_to_hold(trace, events_to_show(trace, 8), 8)
    data = curve_data(trace, held)
    events = np.cumsum(data["events"])
    assert events.tolist() == held.tolist()
    for category in CATEGORIES:
        curve = np.cumsum(data["sizes"].get(spoken(category), [0] * len(held)))
        assert curve.tolist() == trace.timeline(category)[held].tolist()


def test_what_happened_at_an_event_is_held_with_it() -> None:
    built = TraceBuilder()
    built.phase("setup")
    built.new("parameter", 8, module="a")
    built.free(built.new("temporary", 4, module="b", op="aten.mm"))
    data = curve_data(built.trace(), np.array([1, 2]))
    happened = data["happened"]
    assert (happened["born"], happened["size"]) == ([1, 0], [4, 4])
    assert [CATEGORIES[code] for code in happened["category"]] == ["temporary", "temporary"]
    assert (data["runEvents"], data["reserved"]) == (3, None)


def test_the_still_picture_reaches_its_peak_where_the_figure_does() -> None:
    built = TraceBuilder()
    built.phase("setup")
    built.new("parameter", 300, module="a")
    built.free(built.new("activation", 100, module="a"))
    picture = sketch(built.trace())
    # Events 0 to 2 of 300, 400 and 300 bytes. The figure reaches up to 1.14 times the peak of 400.
    # Heights in thousandths from the top: 1 - 300/456 = 342, 1 - 400/456 = 123. Activations lie on top: painted first.
    activation, parameter = re.findall(r'fill="var\(--(\w+)\)" d="([^"]*)"', picture)
    assert activation == ("activation", "M0,1000V342H333V123H667V342H1000V1000z")
    assert parameter == ("parameter", "M0,1000V342H333H667H1000V1000z")
    assert "peak 400 B · setup" in picture
    assert "--left:33.33%;--up:87.72%" in picture


def test_the_still_picture_of_a_run_without_a_byte_is_drawn() -> None:
    built = TraceBuilder()
    built.phase("setup")
    built.new("parameter", 0, module="a")
    assert "peak 0 B" in sketch(built.trace())
