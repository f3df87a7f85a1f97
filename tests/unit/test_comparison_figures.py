"""Several runs: the same axes, differences, prediction against measurement."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import pytest
from traces import TraceBuilder

from memscope.analysis.agreement import Compared, agreements
from memscope.analysis.effects import Run
from memscope.dashboards.comparison import difference, small_multiples
from memscope.errors import UsageError
from memscope.trace import Trace

GIB = 2**30


def run(layers: int, **meta: Any) -> Trace:
    """A parameter of 1 GiB in each layer, an activation of 2 GiB at the end, which is the peak."""
    built = TraceBuilder()
    built.phase("setup")
    for layer in range(layers):
        built.new("parameter", GIB, module=f"layers.{layer}")
    built.phase("forward", 0)
    built.free(built.new("activation", 2 * GIB, module="output", op="aten.mm"))
    return built.trace(meta)


def bars(figure: go.Figure) -> dict[str, float]:
    (drawn,) = figure.data
    names = [text.split("<br>")[0] for text in figure.layout.yaxis.ticktext]
    return dict(zip(names, drawn.x, strict=True))


def test_small_multiples_share_their_axes() -> None:
    figure = small_multiples([Run("one", run(1)), Run("five", run(5))])
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range == (0, 7)
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range
    assert figure.layout.yaxis.range[1] == pytest.approx(7 * 1.36)


def test_small_multiples_name_each_run_and_its_peak() -> None:
    notes = small_multiples([Run("one", run(1)), Run("<b>", run(5))]).layout.annotations
    assert [note.text for note in notes if "peak" in note.text] == [
        "<b>one</b>  peak 3.00 GiB, step 0 · forward",
        "<b>&lt;b></b>  peak 7.00 GiB, step 0 · forward",
    ]


def test_small_multiples_show_every_category_once_in_the_legend() -> None:
    figure = small_multiples([Run("one", run(1)), Run("five", run(5))])
    named = [curve.name for curve in figure.data if curve.showlegend]
    assert named == ["parameter", "activation", "setup", "forward"]


def test_small_multiples_show_the_phases_and_steps_of_each_run() -> None:
    figure = small_multiples([Run("one", run(1)), Run("five", run(5))])
    # Of the second run: setup are events 0 to 4, the forward pass of step 0 events 5 and 6.
    bars = [curve for curve in figure.data if curve.yaxis == "y2" and curve.fill == "toself"]
    assert [(bar.name, bar.x[0], bar.x[2]) for bar in bars] == [("setup", 0, 5), ("forward", 5, 7)]
    # Their bar lies under the axis, where no memory is drawn.
    assert max(max(bar.y[:4]) for bar in bars) < 0
    steps = [(note.text, note.xref, note.x) for note in figure.layout.annotations if note.text.startswith("step")]
    assert steps == [("step 0", "x", 2), ("step 0", "x2", 6)]
    assert [(shape.xref, shape.x0, shape.x1) for shape in figure.layout.shapes] == [("x", 1, 3), ("x2", 5, 7)]


def test_small_multiples_need_a_run() -> None:
    with pytest.raises(UsageError, match="at least one trace"):
        small_multiples([])


def test_difference_is_drawn_by_category_and_by_module_with_layers_together() -> None:
    # Four more layers of 1 GiB; the activation stays.
    assert bars(difference(run(1), run(5))) == {"parameter": 4, "layers.*": 4}
    assert bars(difference(run(5), run(1))) == {"parameter": -4, "layers.*": -4}


def test_a_run_does_not_differ_from_itself() -> None:
    assert bars(difference(run(3), run(3))) == {}


def test_changes_below_a_thousandth_of_the_peak_are_not_drawn() -> None:
    def with_buffers(size_bytes: int) -> Trace:
        built = TraceBuilder()
        built.phase("setup")
        built.new("parameter", 1000 * GIB, module="large")
        built.new("optimizer_state", 2 * GIB, module="state")
        built.new("buffer", size_bytes, module="small")
        return built.trace()

    def without_state(size_bytes: int) -> Trace:
        built = TraceBuilder()
        built.phase("setup")
        built.new("parameter", 1000 * GIB, module="large")
        built.new("buffer", size_bytes, module="small")
        return built.trace()

    # The larger peak is 1002 GiB and 2 KiB: a change of 2 GiB is above a thousandth of it, one of 1 KiB is not.
    assert bars(difference(with_buffers(2048), without_state(1024))) == {"optimizer state": -2, "state": -2}


def test_difference_says_each_change_in_words() -> None:
    assert difference(run(1), run(5)).layout.yaxis.ticktext[0] == "parameter<br><b>+4.00 GiB</b> "


PLAN = {"target": "t", "settings": {"n": 1}, "strategies": ["lora"]}
GPU = {"name": "gpu", "simulated": True}
REAL = {"name": "gpu", "simulated": False}


def test_a_prediction_and_a_measurement_of_the_same_plan_belong_together() -> None:
    predicted, measured = Run("p", run(5, **PLAN, device=GPU)), Run("m", run(4, **PLAN, device=REAL))
    (found,) = agreements([measured, predicted])
    assert (found.predicted, found.measured) == ("p", "m")
    # 5 against 4 layers of 1 GiB; 2 GiB of activations; 7 against 6 in all. There is no allocator to compare.
    assert found.figures == (
        Compared("parameter", 5 * GIB, 4 * GIB),
        Compared("activation", 2 * GIB, 2 * GIB),
        Compared("allocated", 7 * GIB, 6 * GIB),
    )
    assert [str(figure) for figure in found.figures] == ["+25.00%", "+0.00%", "+16.67%"]


@pytest.mark.parametrize(
    "other",
    [
        {**PLAN, "device": GPU},
        {**PLAN, "strategies": [], "device": REAL},
        {**PLAN, "settings": {"n": 2}, "device": REAL},
        {**PLAN, "device": REAL, "imported": {}},
        {},
    ],
    ids=["both simulated", "another plan", "other settings", "another tool's", "unknown"],
)
def test_other_runs_are_not_held_against_each_other(other: dict[str, Any]) -> None:
    assert agreements([Run("p", run(5, **PLAN, device=GPU)), Run("m", run(5, **other))]) == ()


def test_what_was_not_measured_at_all_is_new() -> None:
    assert str(Compared("workspace", 8, 0)) == "new"
    assert str(Compared("workspace", 0, 0)) == "+0.00%"
