"""Table 2: combinations, run times, and runs that run out of memory."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memscope.analysis.grid import Grid, SettingValue, combinations, table2
from memscope.analysis.grid_words import grid_notes
from memscope.cli.grid_report import FORMATS, print_grid
from memscope.errors import MemscopeError, OutOfDeviceMemory, TargetError, UsageError
from memscope.strategies import read_alternatives, read_strategies
from memscope.trace import PHASES, Trace
from tests.traces import TraceBuilder

MIB = 2**20
FACTORS = read_strategies("ga:steps=2,lora")
OFF_OFF, OFF_ON, ON_OFF, ON_ON = (False, False), (False, True), (True, False), (True, True)


def trace(size_mib: int, *, simulated: bool = True, **meta: Any) -> Trace:
    """A run of one step with a single allocation of this many MiB."""
    builder = TraceBuilder()
    builder.phase("forward", step=0)
    builder.new("activation", size_mib * MIB)
    device = {"name": "a100-40gb", "simulated": simulated}
    return builder.trace({"target": "mine", "device": device, "samples_per_step": 8, **meta})


def estimate(*seconds: float) -> dict[str, Any]:
    """The estimate of a step whose forward operators take this long."""
    return {"rows": [[0, 0, PHASES.index("forward"), 0, 0, 1, 0, 0, value] for value in seconds]}


NO_ROOM = OutOfDeviceMemory("the weights do not fit")


def grid_of(*traces: Trace | MemscopeError, samples: int = 200) -> Grid:
    return table2(FACTORS, list(zip((OFF_OFF, OFF_ON, ON_OFF, ON_ON), traces, strict=True)), samples)


def test_every_combination_appears_once_in_the_order_of_the_factors() -> None:
    found = combinations(read_alternatives("ga:steps=2,amp,lora"))
    assert [str(one.plan) for one in found] == [
        "", "lora", "amp", "lora,amp", "ga:steps=2", "lora,ga:steps=2", "amp,ga:steps=2", "lora,amp,ga:steps=2",
    ]  # fmt: skip
    assert found[5].applied == (True, False, True)


def test_alternatives_of_a_setting_are_columns_of_which_a_combination_has_one_or_none() -> None:
    found = combinations(read_alternatives("lora:r=8/64,amp:dtype=bf16"))
    assert [str(one.plan) for one in found] == [
        "", "amp:dtype=bf16", "lora:r=8", "lora:r=8,amp:dtype=bf16", "lora:r=64", "lora:r=64,amp:dtype=bf16",
    ]  # fmt: skip
    assert [one.applied for one in found[-2:]] == [(False, True, False), (False, True, True)]


def test_every_combination_appears_with_each_value_of_a_setting_that_varies() -> None:
    values = [SettingValue("accumulation", "1"), SettingValue("accumulation", "8")]
    found = combinations(read_alternatives("amp"), [values])
    assert [(one.settings["accumulation"], str(one.plan)) for one in found] == [
        ("1", ""), ("1", "amp"), ("8", ""), ("8", "amp"),
    ]  # fmt: skip
    assert found[2].applied == (False, True, False)


def test_a_setting_may_change_the_samples_of_a_step_and_each_run_takes_its_own_number_of_steps() -> None:
    factors = [SettingValue("accumulation", "1"), SettingValue("accumulation", "8")]
    one, eight = (trace(1, samples_per_step=samples, cost=estimate(0.5)) for samples in (1, 8))
    found = table2(factors, [((True, False), one), ((False, True), eight)], 201)
    assert [cell.seconds for cell in found.cells] == [201 * 0.5, 26 * 0.5]
    expected = "Run time: 201 samples are 201 optimizer steps of 1 sample or 26 optimizer steps of 8 samples; each"
    *_, told, warning = grid_notes(found, [])
    assert told.startswith(expected)
    assert "only if all samples have the same length" in warning
    with pytest.raises(UsageError, match="different numbers of samples"):
        table2(factors, [((True, False), one), ((True, False), eight)], 201)


def test_alternatives_of_several_settings_and_of_switches_are_combined(tmp_path: Path) -> None:
    (lora, loss) = read_alternatives("lora:r=8/16,alpha=8/16,loss:chunked/fused,chunks=4")
    assert [(one.config.r, one.config.alpha) for one in lora] == [(8, 8), (8, 16), (16, 8), (16, 16)]
    assert [one.spec for one in loss] == ["loss:chunks=4", "loss:fused,chunks=4"]
    plan = tmp_path / "plan.json"
    plan.touch()
    ((only,),) = read_alternatives(f"ckpt:plan={plan}")
    assert only.config.plan == str(plan)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ga,ga:steps=4", '"ga" occurs 2 times'),
        ("", "no strategy"),
        ("amp,lora:r=8/16/8", '"lora:r=8" is twice among the alternatives of "lora" in "amp,lora:r=8/16/8": leave one'),
        ("lora:r=16/", 'malformed alternatives "16/" in "lora:r=16/": expected values between / such as r=8/16'),
        ("lora:r=8/many", 'setting "r"'),
    ],
)
def test_invalid_factors_are_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        combinations(read_alternatives(text))


def test_run_time_is_the_steps_that_the_samples_take_times_the_estimate_of_one() -> None:
    one = trace(3, cost=estimate(0.5, 0.25))
    found = grid_of(one, one, one, one, samples=201)
    assert found.steps(8) == 26, "25 whole steps of 8 samples, and one more for the last sample"
    assert found.predicted
    assert found.cells[0].seconds == 26 * 0.75
    assert found.cells[0].allocated_bytes == 3 * MIB


def test_measured_seconds_are_those_of_the_last_step() -> None:
    one = trace(3, simulated=False, seconds=[9.0, 2.0])
    found = grid_of(one, one, one, one)
    assert not found.predicted
    assert found.cells[3].seconds == 25 * 2.0


def test_a_predicted_run_that_does_not_fit_shows_the_memory_it_needs_and_no_time() -> None:
    one = trace(70, cost=estimate(1.0), out_of_memory={"limit": 1})
    cell = grid_of(one, one, one, one).cells[0]
    assert (cell.fits, cell.allocated_bytes, cell.seconds) == (False, 70 * MIB, None)


def test_a_measured_run_that_ran_out_of_memory_shows_no_peak() -> None:
    ended = trace(70, simulated=False, seconds=[1.0], out_of_memory={"limit": 1})
    fits = trace(3, simulated=False, seconds=[1.0])
    found = grid_of(ended, NO_ROOM, fits, fits)
    for cell in found.cells[:2]:
        assert (cell.fits, cell.allocated_bytes, cell.reserved_bytes, cell.seconds) == (False, None, None, None)


def test_a_grid_in_which_no_run_has_room_for_its_weights_is_an_error() -> None:
    with pytest.raises(OutOfDeviceMemory, match="do not fit in any combination"):
        grid_of(NO_ROOM, NO_ROOM, NO_ROOM, NO_ROOM)


def test_a_run_that_failed_is_marked_and_named_in_every_format() -> None:
    fits = trace(3, cost=estimate(0.5))
    found = grid_of(fits, TargetError("it was killed"), NO_ROOM, fits)
    assert [cell.fits for cell in found.cells] == [True, None, False, True]
    notes = list(grid_notes(found, []))
    assert "?: the run with lora failed: it was killed." in notes
    assert "| – | ✓ | ? | ? | ? |" in FORMATS[".md"](found, notes)
    rows = list(csv.DictReader(io.StringIO(FORMATS[".csv"](found, notes))))
    assert [row["fits"] for row in rows] == ["1", "", "0", "1"]


def test_runs_with_different_numbers_of_samples_per_step_are_not_compared() -> None:
    one = trace(1)
    with pytest.raises(UsageError, match="different numbers of samples"):
        grid_of(one, one, one, trace(1, samples_per_step=4))


def mixed() -> Grid:
    fits, too_large = trace(1536, cost=estimate(0.5)), trace(70_000, out_of_memory={"limit": 1})
    return grid_of(too_large, too_large, fits, fits)


def test_markdown_marks_the_strategies_and_the_runs_out_of_memory() -> None:
    lines = FORMATS[".md"](mixed(), list(grid_notes(mixed(), ["The same batch in one go (ga)"]))).splitlines()
    assert lines[0] == "Table 2: mine on a100-40gb, predicted"
    assert lines[2] == "| ga:steps=2 | lora | peak allocated (MiB) | peak reserved (MiB) | run time, estimate |"
    assert lines[4] == "| – | – | × 70,000.0 | × | × |"
    assert lines[7] == "| ✓ | ✓ | 1,536.0 | – | 12.5 s |"
    assert "- Off means: the same batch in one go (ga)." in lines
    assert "- ×: runs out of memory; the figures beside it assume unlimited memory." in lines


def test_csv_has_plain_numbers_and_says_in_each_row_that_they_are_predicted() -> None:
    rows = list(csv.DictReader(io.StringIO(FORMATS[".csv"](mixed(), []))))
    first, last = rows[0], rows[-1]
    assert (first["ga:steps=2"], first["fits"], first["peak_allocated_mib"], first["run_seconds"]) == (
        "0", "0", "70000.0", "",
    )  # fmt: skip
    assert (last["lora"], last["fits"], last["peak_allocated_mib"], last["run_seconds"]) == ("1", "1", "1536.0", "12.5")
    assert {row["how"] for row in rows} == {"predicted"}


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({}, 'the rates of "a100-40gb" are unknown'),
        ({"samples_per_step": None}, "samples in the batch of a step cannot"),
    ],
)
def test_without_a_run_time_the_table_says_why(meta: dict[str, Any], reason: str) -> None:
    one, out = trace(1, **meta), io.StringIO()
    found = grid_of(one, one, one, one)
    print_grid(Console(file=out, width=200), found, list(grid_notes(found, [])))
    assert reason in out.getvalue()


def test_a_narrow_terminal_has_a_block_for_each_combination() -> None:
    out = io.StringIO()
    print_grid(Console(file=out, width=60), mixed(), [])
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0] == "Table 2: mine on a100-40gb, predicted"
    assert [line for line in lines[1:] if line and not line.startswith(" ")] == [
        "no strategy", "lora", "ga:steps=2", "ga:steps=2, lora",
    ]  # fmt: skip
    assert "  peak allocated (MiB)  × 70,000.0" in lines
    assert lines[-3:-1] == ["  peak reserved (MiB)   –", "  run time, estimate    12.5 s"]
