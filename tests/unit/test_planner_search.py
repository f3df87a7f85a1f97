"""What the planner's search consists of: labels that are dropped must not be missed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from checkpoint_chains import every_plan, random_chains, takes
from hypothesis import given, settings
from hypothesis import strategies as st

from memscope.advisor.plan.bounds import TimeBound, needs_of
from memscope.advisor.plan.graph import Graph
from memscope.advisor.plan.labels import Labels, undominated
from memscope.advisor.plan.planner import Chain, Choice, plan

Row = tuple[int, int, int]


def beats(one: Row, other: Row) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=120), st.integers(1, 3))
@settings(deadline=None)
def test_of_partial_plans_those_stay_that_no_other_beats_and_one_of_equals(rows: list[Row], parts: int) -> None:
    columns = np.array([(*row, number, 0) for number, row in enumerate(rows)], dtype=np.int64).T
    left = undominated([Labels(*part) for part in np.array_split(columns, parts, axis=1)], most_labels=1000)
    found = list(zip(left.kept.tolist(), left.alive.tolist(), left.nanoseconds.tolist(), strict=True))
    assert sorted(found) == sorted({row for row in rows if not any(beats(other, row) for other in rows)})
    assert [rows[number] for number in left.before] == found


def test_the_bound_is_the_optimum_where_what_is_alive_decides_and_may_lie_below_where_both_sums_do() -> None:
    def choice(option: str, kept_bytes: int, held_bytes: int, nanoseconds: int) -> Choice:
        return Choice(option, 1, kept_bytes, held_bytes, 0, 0, nanoseconds, saves_input=False, saves_output=False)

    choices = (choice("none", 10, 10, 0), choice("keep less", 0, 20, 3), choice("hold less", 10, 0, 3))
    # Within 100 bytes the head leaves room for 60 alive, where four times "none" have 80: "hold less" twice, for 6 ns.
    chain = Chain((choices,) * 4, (0,) * 5, 40, 60, head_saves_input=True, fixed_bytes=0)
    assert plan(chain, 100).nanoseconds == TimeBound.of(Graph.of(chain), 100).nanoseconds == 6
    # And with room for 20 kept, where these four keep 40, "keep less" twice besides: 6 ns more, not seen by the bound.
    both = replace(chain, head_backward_bytes=80)
    assert TimeBound.of(Graph.of(both), 100).nanoseconds == 6
    assert plan(both, 100).nanoseconds == 12


@given(random_chains(most_layers=4), st.data())
@settings(max_examples=50, deadline=None)
def test_every_part_of_a_plan_that_fits_can_be_completed_and_in_no_less_than_its_bound(
    chain: Chain, data: st.DataObject
) -> None:
    every = [(*takes(chain, choices), choices) for choices in every_plan(chain)]
    _, budget, chosen = data.draw(st.sampled_from(every))
    start = chosen[: data.draw(st.integers(0, len(chosen)))]
    layer = kept = held = time = 0
    saved = False
    for choice in start:
        kept += choice.kept_bytes + (chain.boundary_bytes[layer] if choice.saves_input or saved else 0)
        held += choice.held_bytes
        time += choice.nanoseconds
        layer, saved = layer + choice.length, choice.saves_output
    least = min(t for t, peak, choices in every if choices[: len(start)] == start and peak <= budget) - time
    graph = Graph.of(chain)
    sums = np.array([kept]), np.array([kept + held])
    assert needs_of(graph)[layer, saved].are_met(*sums, budget).all()
    bound = TimeBound.of(graph, budget)
    assert bound.at((layer, saved), sums[1])[0] <= least + bound.error
