"""The parts of `make gpu` that need no GPU: choice of cells, time limits, and differences."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_advice
import gpu_plan
import gpu_report

from memscope.allocator.history import History
from memscope.allocator.replay import replay
from memscope.trace import CATEGORIES, PHASES, Trace

MIB = 2**20


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def test_sixteen_cells_cover_every_possible_pair_of_values() -> None:
    cells = gpu_plan.covering(16)
    assert len(set(cells)) == 16
    axes = list(gpu_plan.AXES)
    for one, other in itertools.combinations(axes, 2):
        wanted = set(itertools.product(gpu_plan.AXES[one], gpu_plan.AXES[other]))
        found = {(getattr(cell, one), getattr(cell, other)) for cell in cells}
        # bfloat16 gradients cannot be unscaled, so this pair, and no other, has no cell
        assert wanted - found == ({("bf16", "fp16")} if (one, other) == ("weights", "amp") else set())


def test_the_most_important_cells_come_first_and_none_comes_twice() -> None:
    every = gpu_plan.covering(1000)
    assert tuple(every[:4]) == gpu_plan.FIRST
    # 2 weights x 3 AMP, less one pair, x 2 x 2 x 2 x 2
    assert len(every) == len(set(every)) == 5 * 16
    assert gpu_plan.covering(3) == every[:3]


def test_a_cell_is_a_plan_that_memscope_reads() -> None:
    cell = gpu_plan.TrainingCell("fp32", "fp16", "lora", "all", 8, "sdpa")
    assert cell.plan == "lora,amp:dtype=fp16,ckpt,ga:steps=8"
    assert cell.name == "fp32-ampfp16-lora-ckpt-ga8-sdpa"
    assert gpu_plan.TrainingCell("bf16", "none", "full", "none", 1, "eager").plan == "ga:steps=1"


def test_no_cell_starts_that_might_not_end_in_time() -> None:
    now = 100.0
    budget = gpu_plan.Budget(60, reserve_seconds=20, clock=lambda: now)
    assert budget.left == 40
    assert budget.allows([], guess=40)
    assert not budget.allows([], guess=41)
    now = 120.0
    assert budget.spent == 20
    # 20 seconds are left: enough for a cell that took 16 (a quarter more is 20), not for one that took 17
    assert budget.allows([5, 16], guess=1000)
    assert not budget.allows([17, 5], guess=0)
    now = 300.0
    assert budget.left == 0


def test_equal_sequences_align_without_a_difference() -> None:
    aligned = gpu_report.align(ints(1, 2, 3), ints(1, 2, 3))
    assert aligned.partner.tolist() == [0, 1, 2]
    assert aligned.places == ()


@pytest.mark.parametrize(
    ("ours", "theirs", "partner", "place"),
    [
        ([1, 2, 9, 3, 4], [1, 2, 3, 4], [0, 1, -1, 2, 3], (slice(2, 3), slice(2, 2))),
        ([1, 2, 3, 4], [1, 2, 9, 3, 4], [0, 1, 3, 4], (slice(2, 2), slice(2, 3))),
        ([1, 2, 8, 3, 4], [1, 2, 9, 3, 4], [0, 1, -1, 3, 4], (slice(2, 3), slice(2, 3))),
        ([1, 2], [1, 2, 3], [0, 1], (slice(2, 2), slice(2, 3))),
    ],
    ids=["only in the first", "only in the second", "another size", "longer"],
)
def test_one_difference_does_not_hide_those_after_it(
    ours: list[int], theirs: list[int], partner: list[int], place: tuple[slice, slice]
) -> None:
    aligned = gpu_report.align(ints(*ours), ints(*theirs))
    assert aligned.partner.tolist() == partner
    assert aligned.places == (place,)


def test_sequences_with_nothing_in_common_are_one_difference() -> None:
    aligned = gpu_report.align(ints(1, 1, 1), ints(2, 2))
    assert aligned.partner.tolist() == [-1, -1, -1]
    assert aligned.places == ((slice(0, 3), slice(0, 2)),)


def test_sequences_that_differ_in_two_places_meet_again_in_between() -> None:
    common = list(range(10, 40))
    aligned = gpu_report.align(ints(1, *common, 2, *common), ints(*common, *common))
    assert aligned.places == ((slice(0, 1), slice(0, 0)), (slice(31, 32), slice(30, 30)))


def trace(sizes: list[int], freed: list[int], categories: list[str]) -> Trace:
    """Allocations in sequence, one event each, then the frees."""
    count = len(sizes)
    zeros = np.zeros(count, dtype=np.int64)
    return Trace(
        size=ints(*sizes),
        requested=ints(*sizes),
        category=ints(*(CATEGORIES.index(name) for name in categories)),  # type: ignore[arg-type]
        module=zeros,
        op=zeros,
        phase=np.full(count, PHASES.index("forward")),
        step=zeros,
        micro_batch=zeros,
        born=np.arange(count),
        freed=ints(*freed),
        mark_event=ints(0),
        mark_phase=ints(PHASES.index("forward")),
        mark_step=ints(0),
        mark_micro_batch=ints(0),
        modules=("layers.0",),
        ops=("aten.mm.default",),
        meta={},
    )


def compared(sizes: list[int], freed: list[int], predicted: Trace) -> dict[str, Any]:
    born = np.arange(len(sizes))
    history = History(ints(*sizes), born, ints(*freed), 0 * born, 0 * born, ())
    return gpu_report.compare_sequences(history, replay(history.sizes, born, history.freed), predicted)


def test_the_same_allocations_are_identical_and_give_their_categories_to_the_measured_blocks() -> None:
    predicted = trace([MIB, 1024, 100], [-1, 3, -1], ["parameter", "activation", "input"])
    found = compared([MIB, 1024, 100], [-1, 3, -1], predicted)
    assert found["identical"]
    assert found["identical_with_frees"]
    assert found["first_difference"] is None
    # the block for 100 bytes has 512
    assert found["measured_by_category"] == {"parameter": MIB, "activation": 1024, "input": 512}


def test_another_order_of_frees_is_reported_separately() -> None:
    predicted = trace([MIB, 1024], [2, 3], ["parameter", "activation"])
    found = compared([MIB, 1024], [3, 2], predicted)
    assert found["identical"]
    assert not found["identical_with_frees"]
    assert (found["first_free"]["measured"], found["first_free"]["predicted"]) == (3, 2)


def test_the_first_difference_names_sizes_operator_and_module() -> None:
    predicted = trace([MIB, 1024, 512], [-1, -1, -1], ["parameter", "workspace", "input"])
    found = compared([MIB, 2048, 512], [-1, -1, -1], predicted)
    first = found["first_difference"]
    assert (first["index"], first["measured"], first["predicted"]) == (1, [2048, 512], [1024, 512])
    assert (first["op"], first["module"], first["phase"]) == ("aten.mm.default", "layers.0", "forward")
    assert (found["places"], found["only_measured"], found["only_predicted"]) == (1, 1, 1)
    assert found["measured_by_category"] == {"parameter": MIB, "input": 512, "unmatched": 2048}
    assert found["differences"] == [
        {
            "count": 1,
            "first": 1,
            "only_measured": (2048,),
            "only_predicted": (1024,),
            "op": "aten.mm.default",
            "phase": "forward",
        }
    ]


def row(name: str, measured: int, predicted: int) -> dict[str, Any]:
    sizes = ("allocated", "reserved", "requested")
    return {
        "name": name,
        "status": "measured",
        "measured": {**dict.fromkeys(sizes, measured), "seconds": 0.25},
        "predicted": {**dict.fromkeys(sizes, predicted), "by_category": {"parameter": predicted}},
        "replay": {"exact": True, "first_difference": None},
        "comparison": {
            "identical": measured == predicted,
            "identical_with_frees": True,
            "first_difference": None,
            "measured_by_category": {"parameter": measured},
        },
    }


ROWS = [
    row("one", 100 * MIB, 101 * MIB),
    row("two", 200 * MIB, 200 * MIB),
    row("three", 100 * MIB, 98 * MIB),
    {"name": "four", "status": "skipped: no time left"},
    {"name": "five", "status": "failed: RuntimeError: a|b"},
]


def test_the_summary_has_the_worst_and_the_median_error_of_the_measured_cells() -> None:
    found = gpu_report.summary(ROWS)
    assert (found["cells"], found["measured"], found["compared"], found["identical"]) == (5, 3, 3, 1)
    # errors: 1 in 100, none, 2 in 100
    assert found["allocated_worst"] == pytest.approx(0.02)
    assert found["allocated_median"] == pytest.approx(0.01)


def test_the_table_shows_cells_that_were_left_out_or_failed() -> None:
    alone = {**row("six", 100 * MIB, 100 * MIB), "problem": "prediction stopped after 120 s"}
    del alone["predicted"]
    timed = [
        {"cell": "one", "by": "nothing", "median": 0.2},
        {"cell": "one", "by": "memscope", "median": 0.21},
        {"cell": "one", "by": "MemTracker", "unavailable": "RuntimeError: frozen"},
        {"cell": "two", "by": "memscope", "median": 0.5},
    ]
    results = {
        "dry_run": False,
        "preset": "7b",
        "device": {"name": "NVIDIA H200", "driver": "580"},
        "versions": {"torch": "2.11.0", "cuda": "13.0"},
        "predicted_for": "h200-141gb",
        "date": "2026-01-01",
        "commit": "unknown",
        "lengths": [98, 405],
        "seconds": 400.0,
        "cells": [*ROWS, alone],
        "overhead": timed,
        "advice": [],
        "table2": [],
        "finetuning": [],
        "summary": gpu_report.summary(ROWS),
    }
    lines = gpu_report.table(results).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert "| one | 100.00 | 101.00 | +1.000% | 100.00 | 101.00 | +1.000% | 0.250 | identical |" in lines[6]
    assert "parameter +1.00 MiB" in lines[6]
    assert any(line.startswith("| four | skipped: no time left |") for line in table)
    assert any("a/b" in line for line in table)
    # every row of a table has as many columns as its head
    assert {line.count("|") for line in table[:8]} == {12}
    assert {line.count("|") for line in table[8:]} == {5}
    assert "| one | memscope | 0.2100 | +5.0% |" in table
    assert "| one | MemTracker | RuntimeError: frozen | |" in table
    assert "| two | memscope | 0.5000 |  |" in table


def test_advice_holds_if_the_measured_peak_and_the_context_are_within_the_budget() -> None:
    measured = {"planned": {"allocated": 900 * MIB, "seconds": 1.2}, "none": {"allocated": 990 * MIB, "seconds": 1.0}}
    row = {"case": "lora", "budget": 1000 * MIB, "context": 100 * MIB, "allocated": 890 * MIB}
    row |= {"overhead_vs_none": 0.1, "measured": measured}
    over = {**row, "budget": 999 * MIB}
    lines = gpu_advice.advice_table([row, over, {"case": "full", "problem": "nothing fits"}])
    assert lines[-3] == "| lora | 1000.0 | 890.0 | 900.0 | yes | +10.0% | +20.0% |"
    assert lines[-2] == "| lora | 999.0 | 890.0 | 900.0 | no | +10.0% | +20.0% |"
    assert lines[-1] == "| full | nothing fits | | | | | |"
