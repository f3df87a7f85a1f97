"""Checkpoint plans: exact, with an honest gap, and never a larger peak for a smaller budget."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from checkpoint_chains import every_plan, in_proportion, random_chains, takes, varied
from hypothesis import given, settings
from hypothesis import strategies as st

from memscope.advisor.plan.bounds import TimeBound
from memscope.advisor.plan.graph import Graph
from memscope.advisor.plan.labels import TooManyLabels
from memscope.advisor.plan.planner import Chain, Choice, NothingFits, evaluate, front, minimum_budget, plan
from memscope.advisor.plan.search import PlanSearch
from memscope.errors import GateFailed, MemscopeError

NONE = Choice("none", 1, 10, 0, 12, 14, 0, saves_input=True, saves_output=False)
FULL = Choice("full", 1, 0, 0, 12, 16, 5, saves_input=True, saves_output=False)
TWO = Chain(
    ((NONE, FULL),) * 2, (3, 3, 3), head_forward_bytes=4, head_backward_bytes=6, head_saves_input=True, fixed_bytes=0
)
"""Two equal layers. Kept before layer 1: 13 after `none` (10 and the boundary of 3), 3 after `full`.

none, none  layer 0: 12, 14   layer 1: 13 + 12, 13 + 14   head: 26 + 4, 26 + 6 = 32
full, none  layer 0: 12, 16   layer 1:  3 + 12,  3 + 14   head: 16 + 4, 16 + 6 = 22
none, full  layer 0: 12, 14   layer 1: 13 + 12, 13 + 16 = 29   head: 16 + 4, 16 + 6
full, full  layer 0: 12, 16   layer 1:  3 + 12,  3 + 16 = 19   head:  6 + 4,  6 + 6
"""


def names(choices: tuple[Choice, ...]) -> list[str]:
    return [choice.option for choice in choices]


# By hand.


@pytest.mark.parametrize(
    ("chosen", "peak", "binding"),
    [
        ((NONE, NONE), 32, "head"),
        ((FULL, NONE), 22, "head"),
        ((NONE, FULL), 29, "backward of layer 1"),
        ((FULL, FULL), 19, "backward of layer 1"),
    ],
    ids=lambda value: "-".join(names(value)) if isinstance(value, tuple) else None,
)
def test_the_peak_of_two_layers_is_the_largest_left_side(chosen: tuple[Choice, ...], peak: int, binding: str) -> None:
    found = evaluate(TWO, chosen)
    assert (found.peak_bytes, found.binding) == (peak, binding)
    assert found.nanoseconds == 5 * names(chosen).count("full")


@pytest.mark.parametrize(
    ("budget", "options", "peak"),
    [
        (19, ["full", "full"], 19),
        (21, ["full", "full"], 19),
        (22, ["full", "none"], 22),
        (31, ["full", "none"], 22),
        (32, ["none", "none"], 32),
        (10**18, ["none", "none"], 32),
    ],
)
def test_the_fastest_that_fits_is_chosen_and_of_equals_the_one_with_the_least_peak(
    budget: int, options: list[str], peak: int
) -> None:
    found = plan(TWO, budget)
    assert names(found.choices) == options
    assert found.peak_bytes == peak
    assert found.first_layers == (0, 1)
    assert found.budget_bytes == budget
    assert found.lower_bound_nanoseconds == found.nanoseconds
    assert found.gap == 0


def test_the_least_peak_is_found_among_plans_that_are_equally_fast() -> None:
    def choice(backward_bytes: int, nanoseconds: int) -> Choice:
        return Choice(
            f"{backward_bytes}", 1, 0, 0, 1, backward_bytes, nanoseconds, saves_input=False, saves_output=False
        )

    choices = (choice(64, 0), choice(18, 0), choice(17, 0), choice(5, 9))
    chain = Chain((choices,), (0, 0), 0, 0, head_saves_input=True, fixed_bytes=0)
    assert [plan(chain, budget).peak_bytes for budget in (100, 64, 63, 18, 17, 16, 5)] == [17] * 5 + [5] * 2


def test_where_nothing_fits_the_least_budget_and_what_binds_are_told() -> None:
    assert minimum_budget(TWO) == 19
    with pytest.raises(NothingFits, match=r"18 bytes.*19 bytes.*backward of layer 1") as caught:
        plan(TWO, 18)
    assert isinstance(caught.value, GateFailed)
    assert (caught.value.minimum_bytes, caught.value.binding) == (19, "backward of layer 1")


def test_what_depends_on_no_choice_binds_as_fixed() -> None:
    chain = replace(TWO, fixed_bytes=40)
    assert minimum_budget(chain) == 40
    found = plan(chain, 40)
    assert (found.nanoseconds, found.peak_bytes, found.binding) == (0, 40, "fixed")
    with pytest.raises(NothingFits, match="fixed"):
        plan(chain, 39)


def test_a_boundary_that_the_layer_before_saves_is_there_in_the_backward_and_counted_once() -> None:
    first = Choice("first", 1, 10, 0, 1, 1, 0, saves_input=False, saves_output=True)
    other = Choice("other", 1, 5, 0, 20, 30, 0, saves_input=False, saves_output=False)
    chain = Chain(((first,), (other,)), (2, 7, 1), 0, 0, head_saves_input=True, fixed_bytes=0)
    # Kept before layer 1: 10; the boundary of 7 lives too while its backward runs: 10 + 30 + 7.
    assert evaluate(chain, (first, other)).peak_bytes == 47
    # Where layer 1 saves its input, its own 30 bytes contain it: 10 + 30.
    saving = replace(other, saves_input=True)
    assert evaluate(replace(chain, choices=((first,), (saving,))), (first, saving)).peak_bytes == 40
    assert (minimum_budget(chain), minimum_budget(replace(chain, choices=((first,), (saving,))))) == (47, 40)
    # A head that takes 100 bytes beyond what is kept shows that: 10 + 5 + the boundary, once.
    for last in (other, saving):
        large = replace(chain, choices=((first,), (last,)), head_backward_bytes=100)
        assert evaluate(large, (first, last)).peak_bytes == minimum_budget(large) == 122
    # Without anybody to save it, the boundary is gone: 10 + 5.
    alone = replace(first, saves_output=False)
    gone = replace(chain, choices=((alone,), (other,)), head_backward_bytes=100)
    assert evaluate(gone, (alone, other)).peak_bytes == 115


@pytest.mark.parametrize(("head_saves_input", "peak"), [(True, 110), (False, 118)])
def test_the_last_boundary_is_the_heads_if_it_saves_it_and_the_last_layers_otherwise(
    head_saves_input: bool, peak: int
) -> None:
    last = Choice("last", 1, 10, 0, 1, 1, 0, saves_input=False, saves_output=True)
    chain = Chain(((last,),), (0, 8), 0, 100, head_saves_input, fixed_bytes=0)
    assert evaluate(chain, (last,)).peak_bytes == peak  # 10 kept, 100 of the head, and 8 if not among these
    assert minimum_budget(chain) == peak


def test_what_is_held_until_the_forward_ends_counts_in_forwards_only() -> None:
    holding = Choice("holding", 1, 10, 50, 5, 8, 0, saves_input=False, saves_output=False)
    slower = Choice("slower", 1, 10, 0, 5, 8, 3, saves_input=False, saves_output=False)
    chain = Chain(((holding, slower),) * 2, (0, 0, 0), 1, 2, head_saves_input=True, fixed_bytes=0)
    # Forward of layer 1: 10 + 50 + 5; its backward: 10 + 8; the head: 20 + 100 + 1, and in the backward pass 20 + 2.
    found = evaluate(chain, (holding, holding))
    assert (found.peak_bytes, found.binding) == (121, "head")
    assert plan(chain, 121).nanoseconds == 0
    assert (plan(chain, 120).nanoseconds, plan(chain, 120).peak_bytes) == (3, 71)  # 20 + 50 + 1
    assert (plan(chain, 70).nanoseconds, plan(chain, 70).peak_bytes) == (6, 22)  # 20 + 2
    assert minimum_budget(chain) == 22


def test_one_checkpoint_over_three_layers_keeps_one_boundary() -> None:
    none = Choice("none", 1, 10, 0, 12, 13, 0, saves_input=True, saves_output=False)
    full = Choice("full", 1, 0, 0, 12, 15, 4, saves_input=True, saves_output=False)
    three = Choice("full:3", 3, 0, 0, 12, 28, 12, saves_input=True, saves_output=False)
    chain = Chain(((none, full, three), (none, full), (none, full)), (5,) * 4, 20, 20, True, fixed_bytes=0)
    # Each on its own keeps three boundaries until the head: 15 + 20. Together: 5 + 20, and 28 in the backward.
    assert evaluate(chain, (full, full, full)).peak_bytes == 35
    found = plan(chain, 35)
    assert names(found.choices) == ["full:3"]
    assert (found.peak_bytes, found.binding, found.first_layers) == (28, "backward of layers 0 to 2", (0,))
    assert minimum_budget(chain) == 28


# Against every plan there is.


def budgets(chain: Chain) -> list[int]:
    """Every budget at which the best plan may change, and the budget one byte below."""
    peaks = {takes(chain, choices)[1] for choices in every_plan(chain)}
    return sorted(peaks | {peak - 1 for peak in peaks if peak > min(peaks)})


@given(random_chains())
@settings(max_examples=50, deadline=None)
def test_plans_are_those_of_brute_force_for_every_budget_and_never_grow_when_it_shrinks(chain: Chain) -> None:
    every = sorted(takes(chain, choices) for choices in every_plan(chain))
    least = min(peak for _, peak in every)
    assert minimum_budget(chain) == least
    before = None
    for budget in budgets(chain):
        found = plan(chain, budget)
        assert (found.nanoseconds, found.peak_bytes) == next(taken for taken in every if taken[1] <= budget)
        assert takes(chain, found.choices) == (found.nanoseconds, found.peak_bytes)
        assert (found.lower_bound_nanoseconds, found.gap) == (found.nanoseconds, 0)
        assert TimeBound.of(Graph.of(chain), budget).nanoseconds <= found.nanoseconds * (1 + 1e-12)
        assert before is None or (before.peak_bytes <= found.peak_bytes and before.nanoseconds >= found.nanoseconds)
        before = found
    with pytest.raises(NothingFits) as caught:
        plan(chain, least - 1)
    assert caught.value.minimum_bytes == least


@given(random_chains(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_plans_for_rounded_times_are_certified_and_never_grow_when_the_budget_shrinks(chain: Chain, bits: int) -> None:
    every = sorted(takes(chain, choices) for choices in every_plan(chain))
    peaks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanSearch, "easy", lambda chain: PlanSearch(chain, bits))
        for budget in budgets(chain):
            found = plan(chain, budget)
            fastest = next(time for time, peak in every if peak <= budget)
            assert found.lower_bound_nanoseconds <= fastest <= found.nanoseconds
            # Rounding to this many bits changes no time by more than this part of it.
            error = 2**-bits
            assert found.nanoseconds * (1 - error) <= fastest * (1 + error)
            assert takes(chain, found.choices) == (found.nanoseconds, found.peak_bytes)
            assert found.peak_bytes <= budget
            peaks.append(found.peak_bytes)
    assert peaks == sorted(peaks)


def test_rounded_times_are_not_certified_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """One significant bit makes 5 ns and 4 ns the same 4 ns; of these the leaner is taken, and may be 1 ns too slow."""
    lean = Choice("lean", 1, 0, 0, 1, 1, 5, saves_input=False, saves_output=False)
    fast = Choice("fast", 1, 0, 0, 2, 2, 4, saves_input=False, saves_output=False)
    monkeypatch.setattr(PlanSearch, "easy", lambda chain: PlanSearch(chain, 1))
    found = plan(Chain(((lean, fast),), (0, 0), 0, 0, head_saves_input=False, fixed_bytes=0), 2)
    assert (found.nanoseconds, found.lower_bound_nanoseconds) == (5, 4)
    assert found.gap == 0.25


@given(random_chains())
@settings(max_examples=50, deadline=None)
def test_no_point_of_a_front_is_beaten_and_its_ends_are_the_least_peak_and_the_least_time(chain: Chain) -> None:
    every = [takes(chain, choices) for choices in every_plan(chain)]
    found = front(chain, 4)
    assert 1 <= len(found) <= 4
    for point in found:
        assert not any(
            time <= point.nanoseconds
            and peak <= point.peak_bytes
            and (time, peak) != (point.nanoseconds, point.peak_bytes)
            for time, peak in every
        )
    assert found[0].peak_bytes == min(peak for _, peak in every)
    assert found[-1].nanoseconds == min(time for time, _ in every)


# Larger, against a solver.


@pytest.mark.parametrize("is_held", [False, True], ids=["kept", "kept and held"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_plans_have_the_time_and_the_peak_of_those_of_a_solver_for_mixed_integer_programs(
    seed: int, is_held: bool
) -> None:
    pytest.importorskip("highspy", reason="the reference solver, highspy, is not installed")
    from checkpoint_milp import solve

    chain = varied(seed, layers=8, options=5, is_held=is_held)
    least, most = minimum_budget(chain), front(chain, 2)[-1].peak_bytes
    for budget in (least, (3 * least + most) // 4, (least + most) // 2):
        answer = solve(chain, budget)
        assert answer.is_proven
        found = plan(chain, budget)
        assert (found.nanoseconds, found.peak_bytes) == (round(answer.nanoseconds), round(answer.peak_bytes))
    assert solve(chain, least - 1).nanoseconds == float("inf")


def test_equal_layers_are_planned_without_a_gap() -> None:
    chain = varied(5, layers=1, options=6)
    single = tuple(replace(choice, length=1) for choice in chain.choices[0])
    chain = replace(chain, choices=(single,) * 40, boundary_bytes=(7,) * 41)
    for found in front(chain, 4):
        assert found.gap == 0


def test_a_chain_with_very_many_plans_as_good_as_the_best_gets_one_within_a_thousandth() -> None:
    chain = in_proportion(layers=40, options=2)
    whole = sum(choices[0].kept_bytes for choices in chain.choices)
    assert PlanSearch.easy(chain).bits is not None  # exact searches would outgrow their memory
    for part in (1, 3, 6, 9):
        budget = whole * part // 10
        found = plan(chain, budget)
        assert found.peak_bytes <= budget
        # Time is (bytes not kept) / 100, rounded down in each of 40 layers.
        assert found.lower_bound_nanoseconds <= found.nanoseconds
        assert found.lower_bound_nanoseconds >= (whole - budget) // 100 - 40
        assert found.gap <= 0.001


def test_the_same_chain_has_the_same_plan() -> None:
    chain = varied(4, layers=20, options=6)
    budget = 2 * minimum_budget(chain)
    assert plan(chain, budget) == plan(chain, budget)


def test_a_search_that_outgrows_its_memory_says_so_and_what_to_do() -> None:
    def too_many(*_: object) -> None:
        raise TooManyLabels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanSearch, "easy", PlanSearch)
        patch.setattr(PlanSearch, "fastest", too_many)
        with pytest.raises(MemscopeError, match=r"budget of 22 B .*: try another budget, or round the times"):
            plan(TWO, 22)


# Wrong input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, '"none" covers 0 layers'),
        ({"kept_bytes": -1}, '"none": kept_bytes is -1'),
        ({"held_bytes": -2}, '"none": held_bytes is -2'),
        ({"nanoseconds": -3}, '"none": nanoseconds is -3'),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NONE, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": ()}, "without layers"),
        ({"boundary_bytes": (3, 3)}, "2 boundaries for 2 layers: expected 3"),
        ({"boundary_bytes": (3, -3, 3)}, "less than 0 bytes"),
        ({"choices": ((NONE,), (replace(NONE, length=2),))}, 'layer 1: option "none" covers 2 layers, 1 are left'),
        ({"choices": ((NONE, NONE), (NONE,))}, 'layer 0: option "none" for 1 layers is there twice'),
        ({"choices": ((NONE,), ())}, "none goes on from layer 1"),
        ({"fixed_bytes": 2**60}, "expected less than"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TWO, **changes)  # type: ignore[arg-type]


def test_choices_that_are_not_the_chains_are_refused() -> None:
    with pytest.raises(ValueError, match="cover 1 of 2 layers"):
        evaluate(TWO, (NONE,))
    with pytest.raises(ValueError, match='layer 1 of 2 has no option "other" that covers 1 layers'):
        evaluate(TWO, (NONE, replace(NONE, option="other")))
    with pytest.raises(ValueError, match="layer 2 of 2 has no option"):
        evaluate(TWO, (NONE, NONE, NONE))


def test_choices_are_evaluated_at_what_they_cost_in_the_chain() -> None:
    assert evaluate(TWO, (replace(FULL, nanoseconds=99), NONE)).nanoseconds == 5


def test_a_front_of_one_point_is_refused() -> None:
    with pytest.raises(ValueError, match="front of 1 points: expected 2 or more"):
        front(TWO, 1)


def test_planning_needs_no_torch() -> None:
    script = "import sys, memscope.advisor.plan.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
