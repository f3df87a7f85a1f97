"""What a run tells while it goes, and the panel that shows it."""

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from memscope import Recorder, StepPlan, Workload, record, simulate
from memscope.cli.live import live_panels, panels
from memscope.hooks.live_state import LiveState
from memscope.trace import PHASES

GIB = 2**30
STATE = LiveState(
    memory={"parameter": 8 * GIB, "activation": 4 * GIB, "undecided": GIB},
    peak_bytes=20 * GIB,
    forecast="estimate",
    forecast_bytes=30 * GIB,
    step=1,
    phase="backward",
    micro_batch=1,
    done=5,
    total=8,
    micro_batches=4,
    capacity_bytes=40 * GIB,
)


def text(*states, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(panels([f"run{index}" for index in range(len(states))], states, width))
    return console.file.getvalue()


def row(shown, name):
    """The cells of the row that begins with a name."""
    rows = (re.split(r"\s{2,}", line.strip("│ ")) for line in shown.splitlines())
    return next(cells for cells in rows if cells[0] == name)


def test_the_panel_shows_each_kind_of_memory_against_the_capacity():
    shown = text(STATE)
    assert row(shown, "parameter")[1:3] == ["8.00 GiB", "20.0%"]
    assert row(shown, "not decided yet")[1:3] == ["1.00 GiB", "2.5%"]
    assert row(shown, "now")[1:3] == ["13.0 GiB", "32.5%"]
    assert row(shown, "capacity") == ["capacity", "40.0 GiB"]
    assert "gradient" not in shown


def test_the_panel_says_where_the_run_is():
    shown = text(STATE)
    assert "run0: step 1, backward, micro-batch 2 of 4" in shown
    assert "5 of 8 micro-batches done" in shown


@pytest.mark.parametrize(
    ("forecast", "size", "words"),
    [("so far", "30.0 GiB", "peak so far"), ("estimate", "~30.0 GiB", "estimate"), ("seen", "30.0 GiB", "seen")],
)
def test_a_forecast_says_what_it_rests_on(forecast, size, words):
    shown = text(replace(STATE, forecast=forecast))
    assert row(shown, "peak")[1:] == [size, "75.0%"]
    assert f"peak: {words}" in shown


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_has_every_figure_whole(width):
    shown = text(replace(STATE, memory={**STATE.memory, "unseen": GIB}, forecast_bytes=50 * GIB), width=width)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert row(shown, "rounding, inside kernels")[1:3] == ["1.00 GiB", "2.5%"]
    assert row(shown, "peak")[1:] == ["~50.0 GiB", "125.0%"]
    for words in ("step 1, backward, micro-batch 2 of 4", "5 of 8 micro-batches done", "does not fit"):
        assert words in " ".join(shown.split())


def test_without_a_capacity_shares_are_of_the_peak():
    shown = text(replace(STATE, capacity_bytes=None, memory={"parameter": 15 * GIB}))
    assert row(shown, "parameter")[2] == "50.0%"
    assert "capacity" not in shown


def test_a_forecast_beyond_the_capacity_says_so():
    assert "; does not fit" in text(replace(STATE, forecast_bytes=50 * GIB))
    assert "does not fit" not in text(STATE)


def test_runs_that_wait_or_are_over_take_one_line():
    assert text(None, replace(STATE, done=8)).split("\n") == ["run0: starting", "run1: done, peak 20.0 GiB", ""]


def workload():
    return Workload(
        model=nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)),
        batches=[torch.zeros(8, 16)],
        loss=lambda model, x: model(x).square().mean(),
        optimizer_factory=torch.optim.Adam,
        name="tiny",
        plan=StepPlan(micro_batches=2),
    )


def told(run=record, **options):
    states = []
    return run(workload(), live=states.append, **options), states


@pytest.mark.parametrize("run", [record, simulate])
def test_the_last_state_has_the_peak_of_the_trace(run):
    trace, states = told(run, device="cpu", steps=3)
    assert states[-1].is_finished
    assert states[-1].forecast == "seen"
    assert states[-1].peak_bytes == states[-1].forecast_bytes == trace.peak.allocated_bytes


def test_each_state_has_the_memory_of_the_trace_at_that_phase():
    trace, states = told(steps=2)
    # two micro-batches of forward and backward, optimizer and zero_grad, in each of two steps; then the end
    assert [state.phase for state in states] == (
        ["forward", "backward", "forward", "backward", "optimizer", "zero_grad"] * 2 + ["zero_grad"]
    )
    for state in states[:-1]:
        starts = [
            int(event)
            for event, step, micro_batch, phase in zip(
                trace.mark_event, trace.mark_step, trace.mark_micro_batch, trace.mark_phase, strict=True
            )
            if (step, micro_batch, PHASES[phase]) == (state.step, state.micro_batch, state.phase)
        ]
        before = min(starts) - 1
        assert state.allocated_bytes == trace.allocated[before]
        assert state.peak_bytes == trace.allocated[: before + 1].max()
        assert state.memory["parameter"] == trace.by_category(before)["parameter"]


def test_nothing_is_forecast_in_the_first_step():
    for state in told(steps=1)[1]:
        assert state.forecast == "so far"
        assert state.forecast_bytes == state.peak_bytes


def test_the_estimate_after_the_first_step_is_the_peak_of_the_second():
    trace, states = told(steps=2)
    estimates = {state.forecast_bytes for state in states if state.forecast == "estimate"}
    assert estimates == {trace.peak_of(1).allocated_bytes}


def test_a_recording_without_live_is_the_same():
    trace, _ = told(steps=2)
    assert (record(workload(), steps=2).allocated == trace.allocated).all()


def test_on_a_gpu_the_allocator_has_the_last_word(monkeypatch):
    monkeypatch.setattr(Recorder, "is_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12 * GIB)
    for state in told(steps=1)[1]:
        assert state.allocated_bytes == 10 * GIB
        assert state.memory["unseen"] > 9 * GIB
        assert state.peak_bytes == 12 * GIB


def test_the_screen_follows_what_runs_tell_and_is_cleared_at_the_end():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with live_panels(["first", "second"], console) as report:
        report(0, 5, 8, STATE)
        report(0, 6, 8, None)
        report(1, 8, 8, replace(STATE, done=8))
    shown = console.file.getvalue()
    assert "first: step 1, backward" in shown
    assert "second: done, peak 20.0 GiB" in shown
    assert shown.endswith("\x1b[2K")
