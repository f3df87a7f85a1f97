"""A checkpoint plan as figures and as a page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from traces import TraceBuilder

from memscope.advisor.advice import Advice, Binding, Certificate, FrontPoint, PlanPeak
from memscope.dashboards.plan_page import kept_by_layer, pareto_front, plan_card, plan_heatmap, write_plan_page
from memscope.errors import TraceFileError, UsageError
from memscope.trace import Trace

GIB = 2**30
LAYERS = {
    "layers.0": "full:2",
    "layers.1": "within:layers.0",
    "layers.2": "save:feed_forward.w1/aten.mm+attention.wk/aten.mm",
    "layers.3": "none",
    "layers.4": "full:2",
}


def run() -> Trace:
    """Activations: 1 GiB in layer 0, 3 in layer 2, both alive at the peak; 2 GiB outside of the layers."""
    built = TraceBuilder()
    built.phase("forward", 0)
    built.new("activation", GIB, module="layers.0.w", op="aten.mm")
    built.new("parameter", 9 * GIB, module="layers.3")
    built.new("activation", 3 * GIB, module="layers.2", op="aten.mm")
    built.new("activation", 2 * GIB, module="layers.20", op="aten.mm")
    return built.trace()


def peak(device_gib: int) -> PlanPeak:
    return PlanPeak((device_gib - 2) * GIB, (device_gib - 1) * GIB, device_gib * GIB)


def advice(**changed: Any) -> Advice:
    front = (
        FrontPoint(("lora",), "layers.0-4 full", peak(20), 3.0),
        FrontPoint(("lora",), "nothing", peak(30), 2.0),
    )
    found = Advice(
        target="llama2", device="a100-40gb", budget_bytes=25 * GIB, feasible=True, strategies=("lora",), layers=LAYERS,
        peak=peak(24), step_seconds=2.5, overhead_vs_none=0.25, overhead_vs_all=-0.1,
        certificate=Certificate(2.4, 0.0, 0.04), minimum_bytes=20 * GIB,
        binding=Binding(1, "backward", "layers.3", "aten.mm", 22 * GIB, {"parameter": 20 * GIB}),
        front=front, simulated=2, combinations=4, notes=("a note",), trace=run(),
    )  # fmt: skip
    return dataclasses.replace(found, **changed)


def chosen(figure: go.Figure) -> dict[str, list[int]]:
    """Layers by option, from the cells of the heatmap that are filled."""
    heat = figure.data[0]
    options = figure.layout.yaxis.ticktext
    return {
        option: [x for x, cell in zip(heat.x, row, strict=True) if cell is not None]
        for option, row in zip(options, heat.z, strict=True)
    }


def test_heatmap_has_each_layer_at_its_option() -> None:
    # Layer 1 lies within the checkpoint that begins at layer 0.
    assert chosen(plan_heatmap(LAYERS)) == {"full 2": [0, 1, 4], "save w1+wk": [2], "none": [3]}


def test_heatmap_names_layers_by_their_number_under_their_list() -> None:
    axis = plan_heatmap(LAYERS).layout.xaxis
    assert (axis.title.text, axis.ticktext) == ("layers.*", ("0", "1", "2", "3", "4"))


def test_heatmap_tells_the_whole_option_on_hover() -> None:
    assert plan_heatmap(LAYERS).data[0].customdata[0][2].startswith("layers.2<br>save:feed_forward.w1/aten.mm+")


def test_heatmap_is_coloured_by_what_layers_keep() -> None:
    figure = plan_heatmap(LAYERS, kept_by_layer(run(), list(LAYERS)))
    assert [row[2] for row in figure.data[0].z] == [None, 3, None]
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 3)


def test_what_a_layer_keeps_is_its_own_not_that_of_a_layer_with_a_longer_number() -> None:
    assert kept_by_layer(run(), ["layers.0", "layers.2", "layers.3"]) == {
        "layers.0": GIB,
        "layers.2": 3 * GIB,
        "layers.3": 0,
    }


def test_heatmap_needs_layers() -> None:
    with pytest.raises(UsageError, match="this plan has none"):
        plan_heatmap({})


def test_front_tells_what_fits_the_budget_from_what_does_not() -> None:
    figure = pareto_front(advice())
    points = {curve.name: (list(curve.x), list(curve.y)) for curve in figure.data}
    assert points == {"fits the budget": ([20], [3]), "does not fit": ([30], [2]), "chosen": ([24], [2.5])}
    assert figure.layout.shapes[0].x0 == 25
    assert {curve.marker.symbol for curve in figure.data} == {"circle", "x", "circle-open"}


def test_page_states_the_plan_and_what_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    write_plan_page(advice(), path, overwrite=False)
    page = path.read_text(encoding="utf-8")
    for text in (
        "<h1>llama2 in 25.0 GiB</h1>",
        "<dt>needs</dt><dd>24.0 GiB</dd>",
        "reserved beyond allocated, adds 4.00%. Of 4 combinations",
        "<dd>a note</dd>",
        "layers.0-1 full 2, layers.2 save w1+wk, layers.3 none, layers.4 full 2",
        "<td>layers.0-4 full</td>",
        "The step with this plan",
    ):
        assert text in page


def test_page_says_that_nothing_fits(tmp_path: Path) -> None:
    nothing = advice(feasible=False, layers={}, certificate=None, front=(), trace=None)
    write_plan_page(nothing, tmp_path / "plan.html", overwrite=False)
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "Nothing fits" in page
    assert "<dt>least that a simulated plan needs</dt><dd>24.0 GiB</dd>" in page


def test_page_does_not_say_that_nothing_fits_where_combinations_were_not_tried(tmp_path: Path) -> None:
    nothing = advice(feasible=False, layers={}, certificate=None, front=(), trace=None, untried=("ga", "ga:steps=2"))
    write_plan_page(nothing, tmp_path / "plan.html", overwrite=False)
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "Nothing fits" not in page
    assert "No plan was found that fits" in page
    assert "not tried: &quot;ga&quot;, &quot;ga:steps=2&quot;</dd>" in page


def test_page_names_the_plan_file_and_the_next_command(tmp_path: Path) -> None:
    words = "memscope profile m -s 'ckpt:plan=<my>.json'"
    write_plan_page(advice(file=Path("my.json")), tmp_path / "plan.html", words, overwrite=False)
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "<dt>plan file</dt><dd>my.json</dd>" in page
    assert (
        '<p>Next: <code class="command">memscope profile m -s &#x27;ckpt:plan=&lt;my&gt;.json&#x27;</code></p>' in page
    )


def test_page_is_not_written_over_another_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_plan_page(advice(), path, overwrite=False)
    assert path.read_text() == "mine"
    write_plan_page(advice(), path, overwrite=True)
    assert "llama2" in path.read_text(encoding="utf-8")


def test_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="cannot be written"):
        write_plan_page(advice(), tmp_path / "absent" / "plan.html", overwrite=False)


def test_plan_of_hostile_names_is_no_markup() -> None:
    card = plan_card({"<script>alert(1)</script>": "none"}, "<script>alert(1)</script>").html
    assert "<script>alert" not in card
