"""Queries of a trace, on numbers derived by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from traces import TraceBuilder, random_traces

from memscope.errors import UsageError
from memscope.trace import CATEGORIES, Category, Peak, Trace


def two_steps() -> Trace:
    """17 events: one before the first step, 9 in step 0, 7 in step 1. Comments give the bytes allocated after each."""
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", 100, module="lin")  # 0: 100
    build.phase("forward", 0)
    batch = build.new("input", 8)  # 1: 108
    saved = build.new("activation", 40, module="lin", op="mm")  # 2: 148
    passing = build.new("temporary", 30, module="act", op="add")  # 3: 178
    build.free(passing)  # 4: 148
    build.phase("backward", 0)
    gradient = build.new("gradient", 60, module="lin", op="mm")  # 5: 208
    build.free(saved)  # 6: 168
    build.phase("optimizer", 0)
    build.new("optimizer_state", 50, module="lin", op="zeros")  # 7: 218
    build.phase("zero_grad", 0)
    build.free(gradient, batch)  # 8: 158, 9: 150
    build.phase("forward", 1, 0)  # a micro-batch without an event: the next one begins at the same event
    build.phase("forward", 1, 1)
    build.new("input", 8)  # 10: 158
    saved = build.new("activation", 40, module="lin", op="mm")  # 11: 198
    build.phase("backward", 1, 1)
    gradient = build.new("gradient", 60, module="lin", op="mm")  # 12: 258
    build.free(saved)  # 13: 218
    build.phase("optimizer", 1, 1)
    passing = build.new("temporary", 40, module="lin", op="add")  # 14: 258, as much as at 12
    build.free(passing)  # 15: 218
    build.phase("zero_grad", 1, 1)
    build.free(gradient)  # 16: 158
    return build.trace({"target": "linear"})


def empty() -> Trace:
    return TraceBuilder().trace()


def test_timeline_is_the_bytes_after_each_event() -> None:
    trace = two_steps()
    assert trace.events == 17
    expected = [100, 108, 148, 178, 148, 208, 168, 218, 158, 150, 158, 198, 258, 218, 258, 218, 158]
    assert trace.timeline().tolist() == expected
    assert trace.allocated.tolist() == expected


@pytest.mark.parametrize(
    ("category", "expected"),
    [
        ("parameter", [100] * 17),
        ("activation", [0, 0, 40, 40, 40, 40, 0, 0, 0, 0, 0, 40, 40, 0, 0, 0, 0]),
        ("input", [0, 8, 8, 8, 8, 8, 8, 8, 8, 0, 8, 8, 8, 8, 8, 8, 8]),
        ("workspace", [0] * 17),
    ],
)
def test_timeline_of_a_category_counts_only_its_own(category: Category, expected: list[int]) -> None:
    assert two_steps().timeline(category).tolist() == expected


def test_unknown_category_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match='unknown category "gradeint": did you mean "gradient"'):
        two_steps().timeline("gradeint")  # type: ignore[arg-type]


def test_peak_is_the_first_of_equal_ones() -> None:
    assert two_steps().peak == Peak(event=12, allocated_bytes=258, step=1, phase="backward", micro_batch=1)


def test_peak_of_a_step_ignores_the_others() -> None:
    assert two_steps().peak_of(0) == Peak(event=7, allocated_bytes=218, step=0, phase="optimizer", micro_batch=0)
    assert two_steps().peak_of(1) == two_steps().peak
    assert two_steps().peak_of(None) == two_steps().peak


def test_peak_may_lie_before_the_first_step() -> None:
    build = TraceBuilder()
    build.phase("setup")
    build.free(build.new("temporary", 10))
    build.phase("forward", 0)
    build.new("activation", 4)
    assert build.trace().peak == Peak(event=0, allocated_bytes=10, step=-1, phase="setup", micro_batch=0)


def test_steps_are_those_that_began() -> None:
    assert two_steps().steps == (0, 1)


def test_step_reaches_from_its_first_phase_to_the_next_step() -> None:
    trace = two_steps()
    assert trace.step_range(0) == (1, 10)
    assert trace.step_range(1) == (10, 17)


def test_step_ends_when_its_loop_is_left() -> None:
    build = TraceBuilder()
    build.phase("forward", 0)
    build.new("activation", 4)
    build.phase("outside")
    build.new("other", 100)
    trace = build.trace()
    assert trace.step_range(0) == (0, 1)
    assert trace.peak_of(0).allocated_bytes == 4


def test_missing_step_is_refused_with_the_existing_ones() -> None:
    with pytest.raises(UsageError, match="no step 2; it has 0, 1"):
        two_steps().peak_of(2)
    with pytest.raises(UsageError, match="no step 0; it has none"):
        empty().max_by_category(0)


def test_step_without_an_event_has_no_peak() -> None:
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", 4)
    build.phase("forward", 0)
    with pytest.raises(UsageError, match="nothing was allocated or freed in step 0, so it has no peak"):
        build.trace().peak_of(0)


@pytest.mark.parametrize(
    ("event", "phase", "step", "micro_batch"),
    [(0, "setup", -1, 0), (1, "forward", 0, 0), (4, "forward", 0, 0), (5, "backward", 0, 0), (9, "zero_grad", 0, 0),
     (10, "forward", 1, 1), (16, "zero_grad", 1, 1)],
)  # fmt: skip
def test_mark_at_is_the_phase_an_event_falls_into(event: int, phase: str, step: int, micro_batch: int) -> None:
    trace = two_steps()
    mark = trace.mark_at(event)
    names = ["setup", "forward", "backward", "optimizer", "zero_grad", "forward", "forward", "backward", "optimizer"]
    assert [*names, "zero_grad"][mark] == phase
    assert (trace.mark_step[mark], trace.mark_micro_batch[mark]) == (step, micro_batch)


def test_at_lists_the_allocations_alive_after_an_event() -> None:
    trace = two_steps()
    assert trace.at(0).tolist() == [0]
    assert trace.at(3).tolist() == [0, 1, 2, 3]
    # The temporary dies at event 4 and is gone after it.
    assert trace.at(4).tolist() == [0, 1, 2]
    assert trace.at(12).tolist() == [0, 5, 6, 7, 8]


@pytest.mark.parametrize("event", [-1, 17])
def test_event_outside_the_trace_is_refused(event: int) -> None:
    with pytest.raises(UsageError, match=f"event {event} is outside the trace, which has events 0 to 16"):
        two_steps().at(event)
    with pytest.raises(UsageError, match=f"event {event} is outside"):
        two_steps().by("op", at=event)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            ["category"],
            [("parameter", 100), ("gradient", 60), ("optimizer_state", 50), ("activation", 40), ("input", 8)],
        ),
        (["module"], [("lin", 250), ("", 8)]),
        (["op"], [("", 108), ("mm", 100), ("zeros", 50)]),
        (["phase"], [("setup", 100), ("backward", 60), ("optimizer", 50), ("forward", 48)]),
        (["step"], [(1, 108), (-1, 100), (0, 50)]),
        (["micro_batch"], [(0, 150), (1, 108)]),
        (["op", "step"], [(("", -1), 100), (("mm", 1), 100), (("zeros", 0), 50), (("", 1), 8)]),
        (["step", "op"], [((-1, ""), 100), ((1, "mm"), 100), ((0, "zeros"), 50), ((1, ""), 8)]),
        (
            ["category", "module", "phase"],
            [(("parameter", "lin", "setup"), 100), (("gradient", "lin", "backward"), 60),
             (("optimizer_state", "lin", "optimizer"), 50), (("activation", "lin", "forward"), 40),
             (("input", "", "forward"), 8)],
        ),
    ],
)  # fmt: skip
def test_by_groups_the_peak_largest_first(keys: list[Any], expected: list[tuple[Any, int]]) -> None:
    assert list(two_steps().by(*keys).items()) == expected


def test_by_groups_any_other_moment() -> None:
    assert two_steps().by("category", at=3) == {"parameter": 100, "activation": 40, "temporary": 30, "input": 8}


def test_by_adds_up_allocations_with_the_same_name() -> None:
    trace = two_steps()
    twins = Trace(**{**vars(two_steps()), "modules": ("same",) * len(trace.modules)})
    assert twins.by("module") == {"same": 258}


def test_by_is_empty_at_a_moment_with_nothing_alive() -> None:
    build = TraceBuilder()
    build.phase("forward", 0)
    build.free(build.new("temporary", 10))
    assert build.trace().by("category", "op", at=1) == {}
    assert set(build.trace().by_category(at=1).values()) == {0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["categroy"], 'cannot group a trace by "categroy": did you mean "category"'),
        (["op", "layer"], 'by "layer": .*Valid: category, micro_batch, module, op, phase, step'),
        (["size"], 'by "size"'),
        ([], 'cannot group a trace by "": Valid: category'),
    ],
)
def test_by_refuses_unknown_keys_and_no_keys(keys: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        two_steps().by(*keys)


def test_by_category_has_every_category_in_order() -> None:
    found = two_steps().by_category()
    assert tuple(found) == CATEGORIES
    assert list(found.values()) == [100, 0, 0, 60, 50, 40, 8, 0, 0, 0]


def test_max_by_category_takes_each_at_its_own_moment() -> None:
    # The 40 bytes of `temporary` in step 1 exist when the activation is already freed.
    assert list(two_steps().max_by_category().values()) == [100, 0, 0, 60, 50, 40, 8, 40, 0, 0]
    assert list(two_steps().max_by_category(0).values()) == [100, 0, 0, 60, 50, 40, 8, 30, 0, 0]


def test_max_by_category_counts_allocations_of_earlier_steps() -> None:
    # No optimizer_state is born in step 1; its 50 bytes are from step 0.
    assert two_steps().max_by_category(1)["optimizer_state"] == 50


def test_empty_trace_answers_or_is_refused_as_empty() -> None:
    trace = empty()
    assert (len(trace), trace.events, trace.steps, trace.timeline("input").tolist()) == (0, 0, (), [])
    assert set(trace.max_by_category().values()) == {0}
    for question in (lambda: trace.peak, lambda: trace.by("category"), trace.by_category, trace.peak_of):
        with pytest.raises(UsageError, match="the trace is empty: without an allocation it has no peak"):
            question()
    with pytest.raises(UsageError, match="event 0 is outside the trace, which has no events"):
        trace.at(0)


def test_repr_states_the_peak() -> None:
    assert repr(two_steps()) == "<Trace of linear: 10 allocations, peak 258 bytes in backward, step 1>"
    assert repr(empty()) == "<Trace of ?: 0 allocations>"


@given(random_traces())
def test_categories_sum_to_allocated_at_every_event(trace: Trace) -> None:
    total = np.sum([trace.timeline(category) for category in CATEGORIES], axis=0)
    assert np.array_equal(total, trace.allocated)


@given(random_traces())
def test_groups_sum_to_allocated_at_every_event(trace: Trace) -> None:
    for event in range(trace.events):
        assert int(trace.size[trace.at(event)].sum()) == trace.allocated[event]
        assert sum(trace.by("module", "phase", at=event).values()) == trace.allocated[event]
        assert sum(trace.by_category(at=event).values()) == trace.allocated[event]


@given(random_traces())
def test_no_moment_is_above_the_peak(trace: Trace) -> None:
    if trace.events:
        assert trace.allocated.max() == trace.peak.allocated_bytes == trace.allocated[trace.peak.event]
        assert (trace.allocated[: trace.peak.event] < trace.peak.allocated_bytes).all()
