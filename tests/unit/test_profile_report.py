"""What `memscope profile` prints, on terminals of different widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from memscope import simulate
from memscope.analysis.cost import last_step_seconds
from memscope.analysis.effects import Run, compare
from memscope.analysis.fit import KNOWN_ERROR
from memscope.cli.profile_report import print_remedies, print_report
from memscope.runs.would_free import Remedies, WouldFree
from memscope.strategies import Plan
from memscope.testing import toy_workload
from memscope.units import format_bytes, format_seconds

PLANS = ["ckpt:layers=0", "amp:dtype=bf16", "amp:dtype=bf16,ga:steps=2", "lora:r=4,amp:dtype=bf16"]


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    labels = ["baseline", *(str(Plan.parse(text)) for text in PLANS)]
    plans = ["", *labels[1:]]
    return [
        Run(label, simulate(toy_workload, device="t4", strategies=plan), {})
        for label, plan in zip(labels, plans, strict=True)
    ]


def printed(runs: list[Run], columns: int) -> str:
    out = io.StringIO()
    table = compare(runs[0].trace, runs[1:])
    print_report(Console(file=out, width=columns, highlight=False), runs, table, [])
    return out.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 120, 250])
def test_no_table_is_cut_or_wider_than_the_terminal(runs: list[Run], columns: int) -> None:
    out = printed(runs, columns)
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= columns
    for run in runs:
        assert run.label in out


def test_a_wide_terminal_has_every_table_once_and_a_narrower_one_has_it_in_parts(runs: list[Run]) -> None:
    assert printed(runs, 250).count("Allocated at the peak") == 1
    assert printed(runs, 80).count("Allocated at the peak") > 1


def test_below_70_columns_one_run_stands_below_the_other(runs: list[Run]) -> None:
    assert "│" in printed(runs, 70)
    narrow = printed(runs, 69)
    assert "│" not in narrow
    lines = [line.rstrip() for line in narrow.splitlines()]
    starts = [lines.index(run.label) for run in runs]
    assert starts == sorted(starts)
    peaks = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  peak ")]
    assert peaks == [format_bytes(run.trace.peak.allocated_bytes) for run in runs]


def test_a_small_step_time_is_in_ms_or_µs(runs: list[Run]) -> None:
    seconds = last_step_seconds(runs[0].trace)
    assert seconds is not None
    assert seconds < 1
    assert f"step time (estimate) │ {format_seconds(seconds)}" in " ".join(printed(runs[:1], 120).split())


def test_a_device_without_a_known_context_has_no_row_for_the_driver(runs: list[Run]) -> None:
    assert "device (estimate)" in printed(runs[:1], 120)
    gpu = [Run("baseline", simulate(toy_workload, device="gpu"), {})]
    out = printed(gpu, 120)
    assert "device (estimate)" not in out
    assert "the driver's memory beyond reserved memory is not known for this device" in out


def test_a_run_that_fits_is_said_to_with_the_known_error(runs: list[Run]) -> None:
    lines = printed(runs[:1], 200).splitlines()
    # Toy runs take megabytes of a device with gigabytes.
    assert lines[1].startswith("baseline fits: ")
    assert lines[2] == KNOWN_ERROR


def advice_on(runs: list[Run], before_bytes: int, **failed: str) -> str:
    strategies = [Plan.parse(run.label).strategies[0] for run in runs]
    tried = tuple(WouldFree(s, run.trace, before_bytes, s.exact) for s, run in zip(strategies, runs, strict=True))
    return printed_advice(Remedies(tried, failed))


def printed_advice(remedies: Remedies) -> str:
    out = io.StringIO()
    print_remedies(Console(file=out, width=200, highlight=False), "baseline", remedies)
    return out.getvalue()


def test_advice_tells_what_helps_from_what_does_not(runs: list[Run]) -> None:
    ckpt, amp = runs[1:3]
    peak = ckpt.trace.peak.allocated_bytes
    helps = advice_on([ckpt], peak + 2**20)
    assert helps.splitlines()[0] == "Strategies that would help baseline, simulated together with it:"
    assert helps.splitlines()[1].split()[:2] == ["ckpt:layers=0", "-1.00"]
    assert helps.rstrip().endswith(", fits)")
    assert advice_on([ckpt], peak) == "Strategies that would not help baseline: ckpt:layers=0 (+0 B)\n"
    assert advice_on([amp], 2**40).rstrip().endswith("; changes the precision of matrix products and attention")
    inexact = WouldFree(Plan.parse("ckpt").strategies[0], ckpt.trace, 2**40, is_exact=False)
    assert "; changes the running statistics of batch norm" in printed_advice(Remedies((inexact,), {}))
    assert advice_on([], 0, ga="no samples") == "ga could not be simulated: no samples\n"
