"""The comparisons of Table 2 and of fine-tuning in `make gpu`, and their output."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_finetune
import gpu_table2
from gpu_plan import Budget

from memscope.simulation.devices.catalogue import get_device

MIB = 2**20


class Runs:
    """Answers in place of child processes; keeps the jobs."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.answers = answers
        self.jobs: list[tuple[str, dict[str, Any]]] = []

    def do(self, kind: str, **job: Any) -> dict[str, Any]:
        self.jobs.append((kind, job))
        return self.answers[kind]

    do_next = do


def plenty() -> Budget:
    return Budget(1000.0, reserve_seconds=0.0)


def combination(plan: str, applied: tuple[bool, ...], memory_bytes: int | None) -> dict[str, Any]:
    """The job that predicts one combination of ga and lora on the smallest model."""
    job = {"grid": "ga,lora", "plan": plan, "applied": list(applied), "preset": "debug", "device": "cpu"}
    return {**job, "memory_bytes": memory_bytes, "predicted_for": "h200-141gb"}


def test_without_ga_the_whole_batch_is_one_micro_batch() -> None:
    small = gpu_table2.predict_combination(combination("ga,lora", (True, True), None))
    large = gpu_table2.predict_combination(combination("lora", (False, True), None))
    # Logits alone: 8 padded samples of 405 tokens, 1024 entries of 4 bytes, in place of one.
    assert large["allocated_bytes"] - small["allocated_bytes"] > 7 * 405 * 1024 * 4
    assert small["steps"] == large["steps"] == 25


def test_the_smaller_card_limits_only_the_allocator() -> None:
    free = gpu_table2.predict_combination(combination("ga", (True, False), None))
    # A limit equal to the reserved bytes is enough, although the context would not fit too; one segment less is not.
    exact = gpu_table2.predict_combination(combination("ga", (True, False), free["reserved_bytes"]))
    assert free["reserved_bytes"] < get_device("h200-141gb").context_bytes
    assert exact["fits"]
    less = gpu_table2.predict_combination(combination("ga", (True, False), free["allocated_bytes"] - 2 * MIB))
    assert not less["fits"]


def side(allocated: int | None, *, fits: bool = True) -> dict[str, Any]:
    return {"fits": fits, "allocated_bytes": allocated, "reserved_bytes": allocated, "seconds": 1.5 if fits else None}


def test_table_2_shows_its_errors_and_the_runs_out_of_memory() -> None:
    rows = [
        {"strategies": "", "memory_limit": None, "measured": side(1000 * MIB), "predicted": side(1004 * MIB)},
        {"strategies": "ga", "memory_limit": 2**30, "measured": side(None, fits=False), "predicted": side(900 * MIB)},
        {"strategies": "lora", "memory_limit": 2**30, "measured_problem": "a|b", "predicted": side(5 * MIB)},
    ]
    lines = gpu_table2.table2_lines(rows, "h200-141gb")
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {11}
    assert table[2] == "| all | none | 1000.00 | 1004.00 | +0.400% | 1000.00 | 1004.00 | +0.400% | 1.5 | 1.5 |"
    assert table[3] == "| 1.00 GiB | ga | × | 900.00 |  | × | 900.00 |  |  | 1.5 |"
    assert table[4].startswith("| 1.00 GiB | lora | a/b | 5.00 |")
    assert lines[-2:] == [
        "Peaks of Table 2: worst 0.400% off, bound 0.5%: held.",
        "Wrong predictions of whether a combination fits: ga in 1.00 GiB.",
    ]


def program(tokens_per_second: float, allocated: int) -> dict[str, Any]:
    steps = {"steps": 25, "not_timed": 3, "first_loss": 2.0, "last_loss": 1.5, "skipped": 1}
    return {**steps, "tokens_per_second": tokens_per_second, "allocated": allocated, "reserved": allocated}


def test_our_program_may_be_a_twentieth_slower_but_need_no_more_memory() -> None:
    ours = {**program(95.0, 100 * MIB), "samples": 200, "rows": 64, "finished": True}
    peer = {**program(100.0, 100 * MIB), "versions": {"transformers": "5.0", "peft": "0.21"}}
    lines = gpu_finetune.finetune_lines([{"attention": "eager", "ours": ours, "peer": peer}])
    assert "| eager | transformers 5.0 + peft 0.21 | 100.0 | 100.00 | 100.00 | 2.0000 | 1.5000 | 1 |" in lines
    assert lines[-1] == (
        "eager: 200 samples, from 64 shipped rows, in 25 steps, 3 of them not timed: completed; 0.950 of the peer's "
        "tokens/s, bound 0.95: held; allocated +0.00 MiB, bound 0: held; reserved +0.00 MiB, bound 0: held."
    )
    slower = {**ours, "tokens_per_second": 94.9, "allocated": 101 * MIB}
    last = gpu_finetune.finetune_lines([{"attention": "eager", "ours": slower, "peer": peer}])[-1]
    assert "bound 0.95: not held; allocated +1.00 MiB, bound 0: not held" in last


def test_the_peer_is_given_our_first_step_and_its_failure_keeps_our_figures() -> None:
    ours = {"first_step": {"loss": 1.0}, **program(1.0, MIB), "samples": 8, "rows": 64, "finished": True}
    runs = Runs(finetune=ours, finetune_with_peft={"error": "ModuleNotFoundError: No module named 'peft'"})
    row = gpu_finetune.compare_programs("sdpa", {"steps": 1}, runs, plenty(), 10.0)
    assert [kind for kind, _ in runs.jobs] == ["finetune", "finetune_with_peft"]
    assert runs.jobs[1][1] == {"attention": "sdpa", "steps": 1, "first_step": {"loss": 1.0}}
    assert row["problem"] == "peer: ModuleNotFoundError: No module named 'peft'"
    lines = gpu_finetune.finetune_lines([row])
    assert lines[-1].endswith("not timed: completed.")
    assert {line.count("|") for line in lines if line.startswith("|")} == {9}


def test_a_peer_that_does_other_work_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the reference, PEFT on transformers, is not installed")
    job = {"preset": "debug", "device": "cpu", "attention": "sdpa", "steps": 1, "folder": str(tmp_path / "run")}
    ours = gpu_finetune.finetune(job)
    # A difference of a thousandth in the gradient's norm is found; otherwise the peer's norm equals ours.
    other = {**ours["first_step"], "gradient_norm": 1.002 * ours["first_step"]["gradient_norm"]}
    with pytest.raises(ValueError, match="not the same work: gradient_norm of the first step") as refused:
        gpu_finetune.finetune_with_peft({**job, "first_step": other})
    said = float(str(refused.value).split("first step ")[1].split(",")[0])
    assert said == pytest.approx(ours["first_step"]["gradient_norm"], rel=1e-4)


def test_combinations_that_fail_are_reported_and_stop_nothing() -> None:
    runs = Runs(measure_combination={"error": "no room"}, predict_combination={"error": "no such preset"})
    table = gpu_table2.Table2("lora", None, {"device": "cpu"})
    with ThreadPoolExecutor(1) as pool:
        table.predict(runs, pool, "a100-40gb")
        table.measure(runs, plenty(), 1.0)
        table.wait()
    rows = list(table.rows())
    assert [row["strategies"] for row in rows] == ["", "lora"]
    assert {row["measured_problem"] for row in rows} == {"no room"}
    assert {row["predicted_problem"] for row in rows} == {"no such preset"}
