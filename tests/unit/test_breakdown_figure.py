"""The treemap of what is alive: modules, operators, categories."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from traces import TraceBuilder, random_traces

from memscope.dashboards.breakdown import AreaNode, breakdown, tree
from memscope.dashboards.palette import DARK, LIGHT
from memscope.errors import UsageError
from memscope.trace import Trace


def run() -> Trace:
    built = TraceBuilder()
    built.phase("forward", 0)
    for layer in range(2):
        built.new("parameter", 100, module=f"layers.{layer}.attention.wq")
        built.new("activation", 60, module=f"layers.{layer}.attention.wq", op="aten.mm")
    built.new("activation", 1000, module="output", op="aten.mm")
    return built.trace()


def at(node: AreaNode, *labels: str) -> AreaNode:
    for label in labels:
        node = node.inner[label]
    return node


def test_layers_are_one_node_with_their_list_and_can_be_apart() -> None:
    whole = tree(run(), 4)
    assert list(whole.inner) == ["layers.*", "output"]
    assert at(whole, "layers.*", "attention", "wq").size_bytes == 320
    apart = tree(run(), 4, layers_together=False)
    assert list(apart.inner) == ["layers.0", "layers.1", "output"]


def test_operators_lie_within_modules_and_categories_within_operators() -> None:
    within = at(tree(run(), 4), "layers.*", "attention", "wq")
    assert (at(within, "aten.mm", "activation").size_bytes, at(within, "aten.mm", "activation").count) == (120, 2)
    # Parameters are made by no operator.
    assert at(within, "parameter").size_bytes == 200


def test_a_node_has_the_category_that_holds_most_of_it() -> None:
    whole = tree(run(), 4)
    assert (whole.category, at(whole, "layers.*").category) == ("activation", "parameter")


def test_what_nobody_could_see_is_gathered() -> None:
    built = TraceBuilder()
    built.phase("forward", 0)
    built.new("parameter", 10_000, module="large")
    for index in range(3):
        built.new("activation", 2, module=f"small_{index}", op="aten.mm")
    whole = tree(built.trace(), 3)
    # 2 bytes are less than 10,006 / 2,000.
    assert list(whole.inner) == ["large", "smaller ones"]
    assert (at(whole, "smaller ones").size_bytes, at(whole, "smaller ones").count) == (6, 3)
    assert at(whole, "smaller ones").category == "activation"


def parts_sum_to_the_whole(node: AreaNode) -> bool:
    inner = list(node.inner.values())
    own = (node.size_bytes, node.count) == (sum(n.size_bytes for n in inner), sum(n.count for n in inner))
    return (own or not inner) and all(map(parts_sum_to_the_whole, inner))


@settings(deadline=None)
@given(trace=random_traces(), apart=st.booleans(), data=st.data())
def test_every_node_sums_to_its_parts_and_the_whole_to_what_is_allocated(
    trace: Trace, apart: bool, data: st.DataObject
) -> None:
    assume(trace.events)
    event = data.draw(st.integers(0, trace.events - 1))
    whole = tree(trace, event, layers_together=not apart)
    assert (whole.size_bytes, whole.count) == (trace.allocated[event], len(trace.at(event)))
    assert parts_sum_to_the_whole(whole)


def test_the_figure_shows_the_peak_unless_it_is_asked_for_another_event() -> None:
    assert breakdown(run()).data[0]["values"][0] == 1320
    assert breakdown(run(), at=0).data[0]["values"][0] == 100


def test_the_figure_is_coloured_by_category_in_its_theme() -> None:
    # After the whole come the layers, most of which are parameters.
    assert breakdown(run()).data[0].marker.colors[1] == LIGHT.categories["parameter"]
    assert breakdown(run(), theme=DARK).data[0].marker.colors[1] == DARK.categories["parameter"]


def test_labels_are_no_markup() -> None:
    built = TraceBuilder()
    built.phase("forward", 0)
    built.new("parameter", 1, module="<a href='x'>m</a>")
    assert "&lt;a href=" in breakdown(built.trace()).data[0].labels[1]


def test_an_event_outside_the_trace_is_refused() -> None:
    with pytest.raises(UsageError, match="event 99 is outside the trace"):
        breakdown(run(), at=99)
    with pytest.raises(UsageError, match="the trace is empty"):
        breakdown(TraceBuilder().trace())
