"""The timeline figure, its down-sampling and its colours."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscope.dashboards.downsample import shown_events
from memscope.dashboards.palette import DARK, LIGHT, Theme, replacements
from memscope.dashboards.timeline import timeline, views
from memscope.errors import UsageError
from memscope.trace import CATEGORIES, PHASES, Category, Phase, Trace

GIB = 2**30
Row = tuple[Category, int, int, int]
"""category, size in bytes, born, freed."""
Mark = tuple[int, Phase, int, int]
"""first event, phase, step, micro-batch."""


def trace_of(rows: list[Row], marks: list[Mark]) -> Trace:
    def column(values: list[int]) -> npt.NDArray[np.int64]:
        return np.array(values, dtype=np.int64)

    size, index = column([row[1] for row in rows]), column(list(range(len(rows))))
    zeros = np.zeros_like(size)
    return Trace(
        size=size, requested=size, category=column([CATEGORIES.index(row[0]) for row in rows]), module=index, op=index,
        phase=zeros, step=zeros, micro_batch=zeros, born=column([row[2] for row in rows]),
        freed=column([row[3] for row in rows]), mark_event=column([mark[0] for mark in marks]),
        mark_phase=column([PHASES.index(mark[1]) for mark in marks]), mark_step=column([mark[2] for mark in marks]),
        mark_micro_batch=column([mark[3] for mark in marks]), modules=tuple(f"module{i}" for i in range(len(rows))),
        ops=tuple(f"aten.op{i}" for i in range(len(rows))), meta={},
    )  # fmt: skip


def small() -> Trace:
    """Six events; 3, 4, 6, 4, 7, 6 GiB allocated after them."""
    rows: list[Row] = [
        ("parameter", 3 * GIB, 0, -1),
        ("activation", 1 * GIB, 1, 5),
        ("temporary", 2 * GIB, 2, 3),
        ("gradient", 3 * GIB, 4, -1),
    ]
    return trace_of(rows, [(0, "setup", -1, 0), (1, "forward", 0, 0), (4, "backward", 0, 0)])


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Allocations of any size and category, freed in any order or never; a new phase now and then."""
    rows: list[list[Any]] = []
    alive: list[int] = []
    marks: list[Mark] = [(0, "setup", -1, 0)]
    for event in range(draw(st.integers(1, 120))):
        if alive and draw(st.integers(0, 1)) == 1:
            rows[alive.pop(draw(st.integers(0, len(alive) - 1)))][3] = event
        else:
            alive.append(len(rows))
            rows.append([draw(st.sampled_from(CATEGORIES)), draw(st.integers(0, 2**36)), event, -1])
        if draw(st.integers(0, 9)) == 0:
            marks.append((event, draw(st.sampled_from(PHASES[1:-1])), 0, 0))
    return trace_of([(r[0], r[1], r[2], r[3]) for r in rows], marks)


def curve(figure: go.Figure, name: str) -> Any:
    (found,) = (curve for curve in figure.data if curve.name == name)
    return found


def test_stack_holds_each_category_in_gib() -> None:
    figure = timeline(small())
    assert figure.layout.yaxis.title.text == "GiB"
    assert curve(figure, "parameter").y.tolist() == [3, 3, 3, 3, 3, 3]
    assert curve(figure, "activation").y.tolist() == [0, 1, 1, 1, 1, 0]
    assert curve(figure, "temporary").y.tolist() == [0, 0, 2, 0, 0, 0]
    assert curve(figure, "gradient").y.tolist() == [0, 0, 0, 0, 3, 3]
    assert curve(figure, "allocated").y.tolist() == [3, 4, 6, 4, 7, 6]


def test_stack_starts_with_parameter_and_leaves_unused_categories_out() -> None:
    stacked = [curve.name for curve in timeline(small()).data if curve.stackgroup]
    assert stacked == ["parameter", "gradient", "activation", "temporary"]


def test_hover_tells_what_happened_at_an_event() -> None:
    figure = timeline(small())
    described = curve(figure, "allocated").customdata
    assert described[0] == (
        "3.00 GiB<br>before the first step · setup<br>+3.00 GiB parameter allocated<br>module0 · aten.op0"
    )
    assert described[3] == (
        "4.00 GiB<br>step 0 · forward · micro-batch 0<br>−2.00 GiB temporary freed<br>module2 · aten.op2"
    )
    assert list(curve(figure, "temporary").customdata) == ["0 B", "0 B", "2.00 GiB", "0 B", "0 B", "0 B"]


def test_peak_is_annotated_where_it_is() -> None:
    figure = timeline(small())
    note = figure.layout.annotations[0]
    assert (note.text, note.x, note.y) == ("<b>peak 7.00 GiB · step 0 · backward</b>", 4, 7)
    assert (curve(figure, "peak").x[0], curve(figure, "peak").y[0]) == (4, 7)


def test_phase_bar_spans_each_phase() -> None:
    bar = curve(timeline(small()), "forward")
    assert bar.x[:4].tolist() == [1, 1, 4, 4]
    assert bar.yaxis == "y2"


def test_phase_that_ends_as_it_begins_is_not_drawn() -> None:
    built = trace_of([("parameter", 512, 0, -1)], [(0, "setup", -1, 0), (0, "loss", 0, 0), (0, "backward", 0, 0)])
    names = [curve.name for curve in timeline(built).data]
    assert ("backward" in names, "loss" in names, "setup" in names) == (True, False, False)


def test_category_of_empty_tensors_only_is_left_out() -> None:
    rows: list[Row] = [("parameter", 512, 0, -1), ("buffer", 0, 1, -1)]
    assert [curve.name for curve in timeline(trace_of(rows, [(0, "setup", -1, 0)])).data if curve.stackgroup] == [
        "parameter"
    ]


def test_phase_bar_of_very_many_phases_stays_light() -> None:
    rows: list[Row] = [("activation", 512, event, -1) for event in range(3000)]
    marks: list[Mark] = [(event, "recompute" if event % 7 < 3 else "backward", 0, 0) for event in range(3000)]
    figure = timeline(trace_of(rows, marks), most_positions=100)
    rectangles = sum(len(curve(figure, name).x) / 5 for name in ("recompute", "backward"))
    assert 2 <= rectangles <= 100


def test_views_are_the_whole_run_and_each_step_that_did_something() -> None:
    rows: list[Row] = [("parameter", 512, event, -1) for event in range(6)]
    marks: list[Mark] = [(0, "setup", -1, 0), (1, "forward", 0, 0), (4, "backward", 0, 0), (5, "forward", 1, 0)]
    stopped: Mark = (6, "forward", 2, 0)
    trace = trace_of(rows, [*marks, stopped])
    assert [tuple(view) for view in views(trace)] == [("whole run", 0, 6), ("step 0", 1, 5), ("step 1", 5, 6)]


def test_figure_offers_a_zoom_to_each_step() -> None:
    (menu,) = timeline(small()).layout.updatemenus
    assert [(b.label, b.args[0]["xaxis.range"]) for b in menu.buttons] == [("whole run", [0, 6]), ("step 0", [1, 6])]


def test_small_runs_are_drawn_in_mib() -> None:
    figure = timeline(trace_of([("parameter", 3 * 2**20, 0, -1)], [(0, "setup", -1, 0)]))
    assert figure.layout.yaxis.title.text == "MiB"
    assert curve(figure, "parameter").y.tolist() == [3]


def test_long_run_stopped_before_its_first_step_is_drawn() -> None:
    trace = trace_of([("parameter", GIB, event, -1) for event in range(50)], [(0, "setup", -1, 0)])
    figure = timeline(trace, most_positions=20)
    assert figure.layout.annotations[0].text == "<b>peak 50.0 GiB · setup</b>"
    assert curve(figure, "parameter").y[-1] == 50


def test_empty_trace_has_no_timeline() -> None:
    with pytest.raises(UsageError, match="the trace is empty"):
        timeline(trace_of([], []))


@settings(max_examples=30, deadline=None)
@given(trace=traces(), most=st.integers(8, 130))
def test_every_value_shown_is_the_traces_own(trace: Trace, most: int) -> None:
    figure = timeline(trace, most_positions=most)
    scale = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}[figure.layout.yaxis.title.text]
    shown = np.asarray(curve(figure, "allocated").x)
    assert shown.size <= most
    for area in (c for c in figure.data if c.stackgroup):
        # Scales are powers of two and sizes below 2**53, so the division loses nothing.
        category = next(name for name in CATEGORIES if name.replace("_", " ") == area.name)
        assert np.array_equal(np.asarray(area.y) * scale, trace.timeline(category)[shown])
    assert np.array_equal(np.asarray(curve(figure, "allocated").y) * scale, trace.allocated[shown])


@settings(deadline=None)
@given(trace=traces(), most=st.integers(8, 130))
def test_the_peak_is_always_shown(trace: Trace, most: int) -> None:
    shown = shown_events(trace.allocated, trace.mark_event, most)
    assert trace.allocated[shown].max() == trace.allocated.max()
    assert trace.peak.event in shown


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 2**40), min_size=90, max_size=400), most=st.integers(8, 100))
def test_no_hill_or_valley_is_hidden_beyond_a_stretch(values: list[int], most: int) -> None:
    allocated = np.array(values, dtype=np.int64)
    shown = shown_events(allocated, np.array([], dtype=np.int64), most)
    assert shown.size <= most
    assert np.array_equal(shown, np.unique(shown))
    # Two positions go to the ends of the run, the others in pairs to equal stretches.
    width = 1 if allocated.size <= most else -(-allocated.size // ((most - 2) // 2))
    for event in range(allocated.size):
        near = allocated[shown[np.abs(shown - event) < width]]
        assert near.min() <= allocated[event] <= near.max()


def test_marked_events_are_kept() -> None:
    flat = np.zeros(10_000, dtype=np.int64)
    assert set(range(5, 1000, 50)) <= set(shown_events(flat, np.arange(5, 1000, 50), 100).tolist())


def test_too_many_marked_events_leave_half_of_the_positions_to_the_curve() -> None:
    rising = np.arange(10_000, dtype=np.int64)
    shown = shown_events(rising, np.arange(0, 5000), 100)
    assert shown.size <= 100
    # The last half of the run has no marked event: what is shown there are the ends of its stretches.
    assert np.count_nonzero(shown >= 5000) >= 20


def test_positions_below_eight_are_refused() -> None:
    with pytest.raises(ValueError, match="7 positions cannot hold a curve"):
        shown_events(np.arange(10), np.array([], dtype=np.int64), 7)


# Linear RGB as seen by normal eyes and with full protanopia, deuteranopia and tritanopia:
# Machado, Oliveira, Fernandes (2009), table 1, severity 1.0.
_EYES = np.array([
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
])  # fmt: skip
# Linear sRGB to CIE XYZ with white D65.
_XYZ = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.95030]])


def linear(colour: str) -> npt.NDArray[np.float64]:
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(colour: str, eye: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    ratio = _XYZ @ np.clip(eye @ linear(colour), 0, 1) / _XYZ.sum(axis=1)
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_categories_stay_apart_for_colour_blind_eyes(theme: Theme) -> None:
    # A difference of 2.3 in CIELAB is just noticeable (Mahy et al. 1994); six times that is plain to see.
    for eye in _EYES:
        for one, other in itertools.combinations(CATEGORIES, 2):
            difference = np.linalg.norm(lab(theme.categories[one], eye) - lab(theme.categories[other], eye))
            assert difference >= 6 * 2.3, f"{one} and {other}"


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_readable(theme: Theme) -> None:
    for colour, ground in itertools.product((theme.text, theme.muted, theme.accent), (theme.background, theme.surface)):
        assert contrast(colour, ground) >= 4.5, f"{colour} on {ground}"


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_category_and_phase_has_its_own_colour(theme: Theme) -> None:
    assert len({theme.categories[name] for name in CATEGORIES}) == len(CATEGORIES)
    assert len({theme.phases[name] for name in PHASES}) == len(PHASES)


def test_a_figure_is_painted_in_its_theme() -> None:
    figure = timeline(small(), DARK)
    assert curve(figure, "activation").fillcolor == DARK.categories["activation"]
    assert figure.layout.paper_bgcolor == DARK.surface
    assert figure.layout.annotations[0].font.color == DARK.accent


def test_a_colour_says_which_it_is_in_any_theme() -> None:
    # A page finds the colours of the other theme by those that are there: each must stand for one only.
    for theme in (LIGHT, DARK):
        assert len(set(theme.colours)) == len(theme.colours)
    assert replacements(DARK)[LIGHT.categories["activation"]] == DARK.categories["activation"]


def with_allocator(reserved: list[int], **meta: Any) -> Trace:
    """`small()` with bytes reserved after each of its six events."""
    return dataclasses.replace(small(), reserved=np.array(reserved, dtype=np.int64), meta=meta)


def test_reserved_memory_is_a_line_and_its_peak_in_sight() -> None:
    figure = timeline(with_allocator([GIB * size for size in (3, 4, 6, 8, 8, 8)]))
    assert curve(figure, "reserved").y.tolist() == [3, 4, 6, 8, 8, 8]
    assert figure.layout.yaxis.range[1] == pytest.approx(8 * 1.14)


def test_limit_of_the_device_is_drawn_where_it_is_near() -> None:
    # 9 GiB of which the context takes half: 8.5 GiB can be reserved, within 1.5 times the 8 that are.
    figure = timeline(with_allocator([GIB * 8] * 6, capacity=9 * GIB, context=GIB // 2))
    assert [shape.y0 for shape in figure.layout.shapes if shape.line.dash == "dot"] == [8.5]
    assert "reserved memory limit: 8.50 GiB" in [note.text for note in figure.layout.annotations]
    far = timeline(with_allocator([GIB * 8] * 6, capacity=80 * GIB, context=GIB))
    assert [shape for shape in far.layout.shapes if shape.line.dash == "dot"] == []


def test_where_memory_runs_out_is_marked() -> None:
    meta = {"capacity": 7 * GIB, "context": 0, "out_of_memory": {"event": 4}}
    figure = timeline(with_allocator([GIB * 8] * 6, **meta))
    (note,) = [note for note in figure.layout.annotations if note.text == "runs out here"]
    assert note.x == 4
    assert 4 in [shape.x0 for shape in figure.layout.shapes]


def test_the_peak_of_reserved_memory_is_always_shown() -> None:
    rows: list[Row] = [("activation", 512, event, -1) for event in range(1000)]
    trace = trace_of(rows, [(0, "setup", -1, 0)])
    reserved = np.full(1000, 2**20)
    reserved[777] = 2**21
    shown = curve(timeline(dataclasses.replace(trace, reserved=reserved), most_positions=40), "reserved")
    assert 777 in shown.x
