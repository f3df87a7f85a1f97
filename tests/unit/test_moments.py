"""What a page holds of a trace to say what is alive at the moments it shows."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from traces import TraceBuilder, random_traces

from memscope.analysis.alive import by_module_together, largest, occasion, together
from memscope.dashboards.moments import kept_allocations, page_data
from memscope.dashboards.timeline import events_to_show
from memscope.trace import PHASES, Ints, Trace


def run() -> Trace:
    """Events: 0 to 3 births of 8, 4, 2 and 1 bytes, 4 frees the second, 5 a birth of 16 bytes (the peak: 27), 6 frees
    it again."""
    built = TraceBuilder()
    built.phase("setup")
    built.new("parameter", 8, module="layers.0.w")
    built.phase("forward", 0)
    second = built.new("activation", 4, module="layers.1.w", op="aten.mm")
    built.new("activation", 2, module="layers.1.w", op="aten.add")
    built.new("activation", 1, module="norm", op="aten.add")
    built.phase("backward", 0)
    built.free(second)
    built.free(built.new("temporary", 16, module="norm", op="aten.mul"))
    return built.trace()


def shown(*events: int) -> Ints:
    return np.array(events, dtype=np.int64)


def test_only_what_is_alive_at_an_event_shown_is_kept() -> None:
    assert kept_allocations(run(), shown(0, 3, 6)).rows.tolist() == [0, 1, 2, 3]
    assert kept_allocations(run(), shown(0, 5)).rows.tolist() == [0, 2, 3, 4]


def test_of_too_many_those_at_the_peak_come_first_and_the_largest_of_them() -> None:
    # At the peak: 8, 2, 1 and 16 bytes. The 4 bytes of the second are freed before it.
    assert kept_allocations(run(), shown(0, 3, 5), most=2).rows.tolist() == [0, 4]
    assert kept_allocations(run(), shown(0, 3, 5), most=4).rows.tolist() == [0, 2, 3, 4]


def test_the_largest_left_out_is_told() -> None:
    assert kept_allocations(run(), shown(0, 3, 5), most=4).largest_left_out_bytes == 4
    assert kept_allocations(run(), shown(0, 3, 5), most=5).largest_left_out_bytes == 0


@settings(deadline=None)
@given(trace=random_traces(), most=st.integers(0, 30), data=st.data())
def test_what_is_kept_never_says_more_than_the_trace(trace: Trace, most: int, data: st.DataObject) -> None:
    assume(trace.events)
    events = events_to_show(trace, 8)
    kept = kept_allocations(trace, events, most)
    assert len(kept.rows) <= max(most, 0)
    event = data.draw(st.sampled_from(events.tolist()))
    alive, held = trace.at(event), np.intersect1d(trace.at(event), kept.rows)
    left_out = np.setdiff1d(alive, held)
    assert trace.size[left_out].max(initial=0) <= kept.largest_left_out_bytes
    if most >= len(trace):
        assert held.tolist() == alive.tolist()


@settings(deadline=None)
@given(trace=random_traces())
def test_births_and_deaths_can_be_had_back_from_the_page(trace: Trace) -> None:
    assume(trace.events)
    data = page_data(trace, events_to_show(trace))
    columns = data["columns"]
    born = np.cumsum(columns["born"])
    life = np.array(columns["life"])
    assert born.tolist() == trace.born.tolist()
    assert np.where(life == 0, -1, born + life).tolist() == trace.freed.tolist()
    assert [data["modules"][code] for code in columns["module"]] == [trace.modules[code] for code in trace.module]
    for row in np.flatnonzero(trace.freed >= 0).tolist():
        mark = trace.mark_at(int(trace.freed[row]))
        assert (columns["diedPhase"][row], columns["diedStep"][row]) == (trace.mark_phase[mark], trace.mark_step[mark])


@settings(deadline=None)
@given(trace=random_traces())
def test_number_of_allocations_alive_is_told_of_every_event_shown(trace: Trace) -> None:
    assume(trace.events)
    events = events_to_show(trace, 8)
    assert np.cumsum(page_data(trace, events)["alive"]).tolist() == [len(trace.at(event)) for event in events.tolist()]


def test_largest_allocations_are_in_order_and_say_where_they_come_from() -> None:
    first, second = largest(run(), 2)
    assert (first.size_bytes, first.category, first.module, first.op) == (16, "temporary", "norm", "aten.mul")
    assert (first.born_in, first.freed_in) == ("step 0 · backward · micro-batch 0", "step 0 · backward")
    assert (first.born, first.freed, first.life) == (5, 6, "5 to 6")
    assert (second.size_bytes, second.born_in, second.freed, second.freed_in) == (8, "setup", None, "")
    assert second.life == "0 to the end"


def test_before_the_first_step_there_is_neither_step_nor_micro_batch() -> None:
    assert occasion(-1, PHASES[0], 0) == "setup"
    assert occasion(-1, "outside", 0) == "before step 0"
    assert occasion(-1, "inference", 0) == "before step 0 · inference"
    assert occasion(2, "backward") == "step 2 · backward"


def test_modules_of_all_layers_are_counted_together() -> None:
    # At event 3: 8 + 4 + 2 bytes in the layers, 1 in the norm.
    assert by_module_together(run(), at=3) == {"layers.*.w": 14, "norm": 1}
    assert together("layers.3.experts.12.w2") == "layers.*.experts.*.w2"
    assert together("conv1d") == "conv1d"
