"""Table 1, on traces built by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from traces import TraceBuilder

from memscope.analysis.effects import ROWS, Column, Effect, Run, compare, steady_step
from memscope.errors import UsageError
from memscope.trace import Category, Phase, Trace

MIB = 2**20


def trace_of(*steps: Mapping[Category, int], flops: int = 10**9, seconds: float | None = None) -> Trace:
    """A run whose categories reach the given sizes in each of its steps; parameters are those of the first."""
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", steps[0].get("parameter", 0))
    for number, sizes in enumerate(steps):
        build.phase("forward", number)
        saved = [
            build.new("weight_copy", sizes.get("weight_copy", 0), op="cast"),
            build.new("activation", sizes.get("activation", 0), op="mm"),
        ]
        build.phase("backward", number)
        gradient = build.new("gradient", sizes.get("gradient", 0), op="mm")
        build.free(*saved)
        build.phase("optimizer", number)
        state = build.new("optimizer_state", sizes.get("optimizer_state", 0), op="adamw")
        build.phase("zero_grad", number)
        build.free(gradient, state)
    meta: dict[str, Any] = {"flops": [flops] * len(steps), "seconds": seconds and [seconds] * len(steps)}
    return build.trace(meta)


def column(baseline: Trace, trace: Trace, **usual: str) -> Column:
    (found,) = compare(baseline, [Run("plan", trace, usual)]).columns
    return found


def effect(row: Category, before: int, after: int) -> Effect:
    """The effect on one row when its category alone changes from `before` to `after` bytes."""
    return column(trace_of({row: before}), trace_of({row: after}))[row]


MEMORY_ROWS: list[Category] = [row for row in ROWS if row != "computation"]


@pytest.mark.parametrize("row", MEMORY_ROWS)
@pytest.mark.parametrize(
    ("before", "change", "arrow"),
    [
        # 1 % of 200 MiB is 2 MiB: the share decides.
        (200 * MIB, 2 * MIB, "–"), (200 * MIB, 2 * MIB + 1, "↑"),
        (200 * MIB, -2 * MIB, "–"), (200 * MIB, -2 * MIB - 1, "↓"),
        # 1 % of 50 MiB is half a MiB: the bytes decide.
        (50 * MIB, MIB, "–"), (50 * MIB, MIB + 1, "↑"), (50 * MIB, -MIB, "–"), (50 * MIB, -MIB - 1, "↓"),
        # 1 % of 100 MiB is 1 MiB: both.
        (100 * MIB, MIB, "–"), (100 * MIB, MIB + 1, "↑"),
        (0, MIB, "–"), (0, MIB + 1, "↑"), (50 * MIB, -50 * MIB, "↓"), (0, 0, "–"),
    ],
)  # fmt: skip
def test_arrow_needs_more_than_one_percent_and_one_mib(row: Category, before: int, change: int, arrow: str) -> None:
    found = effect(row, before, before + change)
    assert (found.arrow, found.before, found.after) == (arrow, before, before + change)


@pytest.mark.parametrize(
    ("before", "after", "arrow"),
    [
        (1000, 1010, "–"), (1000, 1011, "↑"), (1000, 990, "–"), (1000, 989, "↓"), (700, 707, "–"),
        (0, 0, "–"), (0, 1, "↑"),
    ],
)  # fmt: skip
def test_arrow_of_computation_needs_more_than_one_percent(before: int, after: int, arrow: str) -> None:
    found = column(trace_of({}, flops=before), trace_of({}, flops=after))["computation"]
    assert (found.arrow, found.before, found.after) == (arrow, before, after)


def test_a_row_considers_only_its_own_category() -> None:
    sizes: dict[Category, int] = {
        "parameter": 50 * MIB,
        "activation": 40 * MIB,
        "gradient": 30 * MIB,
        "optimizer_state": 20 * MIB,
    }
    for row in MEMORY_ROWS:
        changed = column(trace_of(sizes), trace_of(sizes | {row: 0}))
        assert {each.row: each.arrow for each in changed.effects} == dict.fromkeys(ROWS, "–") | {row: "↓"}


def test_weight_copies_count_as_parameters_with_both_shown() -> None:
    baseline = trace_of({"parameter": 100 * MIB})
    found = column(baseline, trace_of({"parameter": 100 * MIB, "weight_copy": 50 * MIB}))["parameter"]
    assert (found.arrow, found.before, found.after) == ("↑", 100 * MIB, 150 * MIB)
    assert found.parts == (("parameter", 100 * MIB, 100 * MIB), ("weight_copy", 0, 50 * MIB))


def test_weight_copies_and_parameters_are_counted_at_one_moment() -> None:
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", 100 * MIB)
    build.phase("forward", 0)
    build.free(build.new("weight_copy", 40 * MIB))
    build.new("parameter", 10 * MIB)
    build.new("weight_copy", 20 * MIB)
    found = column(trace_of({"parameter": 100 * MIB}), build.trace({"flops": [1]}))["parameter"]
    # 100 + 40 at first, 110 + 20 at last; never 110 + 40.
    assert found.after == 140 * MIB
    assert found.parts == (("parameter", 100 * MIB, 110 * MIB), ("weight_copy", 0, 40 * MIB))


def test_other_rows_have_no_parts() -> None:
    assert all(each.parts == () for each in column(trace_of({}), trace_of({})).effects if each.row != "parameter")


def test_steady_step_is_the_second_or_the_only_one() -> None:
    assert [steady_step(trace_of(*[{}] * steps)) for steps in (1, 2, 3)] == [0, 1, 1]


def test_only_the_steady_step_is_compared() -> None:
    before = trace_of({"gradient": 90 * MIB}, {"gradient": 20 * MIB})
    found = column(before, trace_of({"gradient": 90 * MIB}, {"gradient": 10 * MIB}, {"gradient": 70 * MIB}))
    assert (found["gradient"].before, found["gradient"].after) == (20 * MIB, 10 * MIB)


def test_computation_is_that_of_the_steady_step() -> None:
    before, after = trace_of({}, {}), trace_of({}, {}, {})
    before.meta["flops"][:], after.meta["flops"][:] = [9, 100], [9, 200, 9]
    assert column(before, after)["computation"].after == 200
    assert column(before, after)["computation"].before == 100


def test_trace_without_a_step_cannot_be_compared() -> None:
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", 10)
    with pytest.raises(UsageError, match="the trace has no training step to compare"):
        column(trace_of({}), build.trace({"flops": []}))


@pytest.mark.parametrize(
    ("before", "after", "seconds"), [(2.0, 1.5, (2.0, 1.5)), (None, 1.5, None), (2.0, None, None), (None, None, None)]
)
def test_seconds_are_given_only_when_both_were_measured(
    before: float | None, after: float | None, seconds: tuple[float, float] | None
) -> None:
    found = column(trace_of({}, {}, seconds=before), trace_of({}, {}, seconds=after))
    assert found["computation"].seconds == seconds
    assert found["gradient"].seconds is None


def test_comparison_is_described() -> None:
    assert column(trace_of({}), trace_of({}, {})).comparison == (
        "peak of each category in step 1 with the strategy, compared with step 0 of the baseline; "
        "computation: floating-point operations of the same steps"
    )


def test_table_has_a_column_per_plan() -> None:
    runs = [Run("lora", trace_of({}), {}), Run("amp", trace_of({"gradient": 2 * MIB}, flops=2 * 10**9), {})]
    unchanged = dict.fromkeys(ROWS, "–")
    expected = {"lora": unchanged, "amp": unchanged | {"gradient": "↑", "computation": "↑"}}
    assert compare(trace_of({}), runs).arrows() == expected


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (effect("gradient", 200 * MIB, 50 * MIB), "↓ -150.0 MiB (-75.0%)"),
        (effect("gradient", 200 * MIB, 200 * MIB), "–"),
        (effect("gradient", 0, 3 * MIB), "↑ +3.00 MiB (new)"),
        (effect("gradient", 0, 0), "–"),
        # Below 1 MiB is no change: the dash stands apart from the sign of what little there is.
        (effect("gradient", 4 * MIB, 4 * MIB + MIB // 2), "– (+512.0 KiB, +12.5%)"),
        (effect("gradient", 0, MIB // 2), "– (+512.0 KiB, new)"),
        (effect("gradient", 400 * MIB, 399 * MIB), "– (-1.00 MiB, -0.2%)"),
        (Effect("computation", "↑", 2 * 10**12, 3 * 10**12), "↑ +1.00 TFLOP (+50.0%)"),
        (Effect("computation", "↓", 4_430 * 10**10, 2_960 * 10**10), "↓ -14.7 TFLOP (-33.2%)"),
        (Effect("computation", "–", 2 * 10**12, 2 * 10**12), "–"),
    ],
)
def test_cell_reads_as_arrow_change_and_share(found: Effect, text: str) -> None:
    assert str(found) == text


def note(baseline: Trace, trace: Trace, row: str, usual: str) -> str:
    return column(baseline, trace, **{row: usual})[row].note


def test_no_note_if_the_textbook_is_right_or_silent() -> None:
    baseline, halved = trace_of({"gradient": 10 * MIB}), trace_of({"gradient": 5 * MIB})
    assert note(baseline, halved, "gradient", "↓") == ""
    assert note(baseline, halved, "gradient", "") == ""
    assert column(baseline, halved)["gradient"].note == ""


def casts(kept: int, dropped: int, *, phase: Phase = "forward") -> Trace:
    """Parameters of 40 MiB; casts of 4 MiB each: the dropped ones end before the backward pass, the kept ones in it."""
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", 40 * MIB)
    build.phase(phase, 0)
    made = [build.new("weight_copy", 4 * MIB, op="aten._to_copy") for _ in range(kept + dropped)]
    other = build.new("weight_copy", 2 * MIB, op="aten.clone")
    build.free(other, *made[kept:])
    build.phase("backward", 0)
    build.free(*made[:kept])
    return build.trace({"flops": [1]})


@pytest.mark.parametrize("phase", ["forward", "loss", "recompute"])
def test_note_names_category_operator_phase_and_how_many_are_kept(phase: Phase) -> None:
    # All three casts and the clone are alive at the peak; the clone's 2 MiB are the smaller part of the change.
    assert note(trace_of({"parameter": 40 * MIB}), casts(2, 1, phase=phase), "parameter", "↓") == (
        f"usually ↓, here ↑: +12.0 MiB of weight copy made by aten._to_copy in {phase}; "
        "2 of 3 kept for the backward pass"
    )


def test_note_counts_the_allocations_of_one_phase_in_one_step() -> None:
    build = TraceBuilder()
    for step in (0, 1):
        build.phase("forward", step)
        made = [build.new("weight_copy", 4 * MIB, op="cast") for _ in range(2)]
        build.phase("loss", step)
        made += [build.new("weight_copy", 2 * MIB, op="cast")]
        build.phase("backward", step)
        build.free(*made)
    assert note(trace_of({}), build.trace({"flops": [1, 1]}), "parameter", "↓") == (
        "usually ↓, here ↑: +8.00 MiB of weight copy made by cast in forward; 2 of 2 kept for the backward pass"
    )


def test_note_counts_what_is_alive_at_the_end_as_kept() -> None:
    build = TraceBuilder()
    build.phase("forward", 0)
    build.new("weight_copy", 4 * MIB, op="cast")
    build.phase("backward", 0)
    build.new("gradient", 1)
    assert note(trace_of({}), build.trace({"flops": [1]}), "parameter", "–") == (
        "usually –, here ↑: +4.00 MiB of weight copy made by cast in forward; 1 of 1 kept for the backward pass"
    )


def test_note_does_not_mention_keeping_if_nothing_is_kept() -> None:
    assert note(trace_of({"parameter": 40 * MIB}), casts(0, 3), "parameter", "↓") == (
        "usually ↓, here ↑: +12.0 MiB of weight copy made by aten._to_copy in forward"
    )


def test_note_does_not_mention_keeping_without_a_backward_pass() -> None:
    build = TraceBuilder()
    build.phase("forward", 0)
    build.new("activation", 4 * MIB, op="mm")
    assert note(trace_of({}), build.trace({"flops": [1]}), "activation", "↓") == (
        "usually ↓, here ↑: +4.00 MiB of activation made by mm in forward"
    )


def test_gradients_are_not_called_kept_for_a_later_backward_pass() -> None:
    build = TraceBuilder()
    for micro_batch in (0, 1):
        build.phase("backward", 0, micro_batch)
        build.new("gradient", 4 * MIB, op="mm")
    assert note(trace_of({}), build.trace({"flops": [1]}), "gradient", "–") == (
        "usually –, here ↑: +8.00 MiB of gradient made by mm in backward"
    )


def test_note_on_less_memory_names_the_allocations_that_went() -> None:
    baseline = trace_of({"parameter": 40 * MIB, "activation": 30 * MIB})
    assert note(baseline, trace_of({"parameter": 40 * MIB}), "activation", "↑") == (
        "usually ↑, here ↓: -30.0 MiB of activation made by mm in forward"
    )
    assert note(baseline, trace_of({"parameter": 8 * MIB}), "parameter", "–") == (
        "usually –, here ↓: -32.0 MiB of parameter made by the model in setup"
    )


def test_note_names_the_largest_change_in_the_direction_of_the_row() -> None:
    # +5 MiB in total: mm −8, add +7, cat +6.
    def run(**sizes_mib: int) -> Trace:
        build = TraceBuilder()
        build.phase("forward", 0)
        made = [build.new("activation", size * MIB, op=op) for op, size in sizes_mib.items()]
        build.free(*made)
        return build.trace({"flops": [1]})

    assert note(run(mm=9, add=1), run(mm=1, add=8, cat=6), "activation", "↓") == (
        "usually ↓, here ↑: +7.00 MiB of activation made by add in forward"
    )


def test_note_on_no_change_states_the_sizes() -> None:
    baseline = trace_of({"gradient": 40 * MIB})
    assert note(baseline, trace_of({"gradient": 40 * MIB}), "gradient", "↓") == "usually ↓, here –: 40.0 MiB, as before"
    # 40.5 MiB: less than 1 MiB more.
    slightly = trace_of({"gradient": 40 * MIB + MIB // 2})
    assert note(baseline, slightly, "gradient", "↓") == "usually ↓, here –: 40.0 MiB became 40.5 MiB"


def test_note_on_computation_states_the_operations() -> None:
    before, after = trace_of({}, flops=10**9), trace_of({}, flops=5 * 10**8)
    assert note(before, after, "computation", "↑") == ("usually ↑, here ↓: 1.00 GFLOP became 500.0 MFLOP")
    assert note(before, before, "computation", "↓") == "usually ↓, here –: 1.00 GFLOP, as before"
