"""`make gpu` from end to end without a GPU: the debug model on the CPU in place of each measurement."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_jobs import BENCHMARKS, ForkedJob

SCRIPT = BENCHMARKS / "gpu.py"
Run = tuple[Path, str, dict[str, Any]]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script as a module, whose jobs are forks: starting a Python for each takes most of a dry run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        script = importlib.import_module("gpu")
        patch.setattr(script.Processes, "_start", lambda processes: ForkedJob(processes._scratch))
        yield script


def run(out: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), **variables}
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def printed_by(gpu: Any, out: Path, *words: str) -> str:
    """What the script prints, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert gpu.main(["--out", str(out), *words]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def dry_run(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("out")
    words = ["--dry-run", "--cells", "1", "--steps", "3", "--timed", "2", "--advised", "0"]
    words += ["--rounds", "1", "--grid", "lora", "--tuned", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")  # there is neither git nor nvidia-smi
        patch.setenv("MEMSCOPE_COMMIT", "abc123")
        printed = printed_by(gpu, out, *words)
    return out, printed, json.loads((out / "cells.json").read_text())


def test_the_table_is_printed_and_written(dry_run: Run) -> None:
    out, printed, _ = dry_run
    assert (out / "table.md").read_text().strip() == printed.strip()
    assert "Dry run, nothing here is a measurement" in printed


def test_every_cell_is_measured_predicted_and_compared(dry_run: Run) -> None:
    _, _, results = dry_run
    assert [row["status"] for row in results["cells"]] == ["measured"]
    for row in results["cells"]:
        assert row["replay"]["exact"], row["replay"]
        assert row["measured"]["seconds"] > 0
        for side in ("measured", "predicted"):
            assert row[side]["requested"] <= row[side]["allocated"] <= row[side]["reserved"]
        # the weights come first and in one order, so they are matched on both sides
        parameters = row["comparison"]["measured_by_category"]["parameter"]
        assert parameters == row["predicted"]["by_category"]["parameter"]
        # a CPU has no cuBLAS, so the sequences must differ, and the first place is a matrix product
        assert row["comparison"]["first_difference"]["op"] == "aten.mm.default"
    assert [(run["by"], "median" in run) for run in results["overhead"]] == [("nothing", True), ("memscope", True)]


def test_every_combination_of_table_2_is_measured_and_predicted(dry_run: Run) -> None:
    _, printed, results = dry_run
    rows = results["table2"]
    assert [(row["strategies"], row["memory_limit"]) for row in rows] == [("", None), ("lora", None)]
    for row in rows:
        for side in ("measured", "predicted"):
            assert row[side]["fits"]
            assert row[side]["steps"] == 25  # 200 samples, 8 a step
            assert row[side]["seconds"] > 0
    # Two float32 moments of each trained weight: 4 layers, embedding, head and norm of width 192; or 4 layers' updates.
    everything = 4 * (4 * 192**2 + 3 * 192 * 512 + 2 * 192) + 2 * 1024 * 192 + 192
    for row, trained in zip(rows, (everything, 4 * 2 * 2 * 16 * 192), strict=True):
        assert row["measured"]["optimizer_state_bytes"] == pytest.approx(2 * 4 * trained, rel=1e-3)
    assert "| all | lora | " in printed
    assert "Peaks of Table 2: worst " in printed


def test_both_programs_do_the_same_work(dry_run: Run) -> None:
    pytest.importorskip("peft", reason="the reference, PEFT on transformers, is not installed")
    _, printed, results = dry_run
    (row,) = results["finetuning"]
    assert "problem" not in row, row
    ours, peer = row["ours"], row["peer"]
    assert ours["finished"]
    assert (ours["steps"], ours["samples"], ours["rows"]) == (1, 8, 64)
    assert ours["first_loss"] == pytest.approx(peer["first_loss"], rel=1e-3)  # with autocast, in float16
    assert ours["tokens_per_second"] > 0
    assert ours["allocated"] is peer["allocated"] is None  # a CPU counts none
    assert "| eager | memscope.targets.llama2.finetune | " in printed
    assert "of the peer's tokens/s" in printed


def test_commit_and_driver_are_known_without_git_and_nvidia_smi(dry_run: Run) -> None:
    _, _, results = dry_run
    assert results["commit"] == "abc123"
    assert results["device"] == {"name": "CPU", "driver": "unknown"}


def test_files_are_few_and_small_and_histories_can_be_golden(dry_run: Run) -> None:
    out, _, results = dry_run
    files = sorted(out.iterdir())
    assert len(files) <= 8
    golden = [file for file in files if file.suffix == ".npz"]
    assert [file.name for file in golden] == sorted(f"golden-{row['name']}.npz" for row in results["cells"])
    for file in golden:
        assert file.stat().st_size < 2 * 2**20
        with np.load(file, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            assert about["measured"]["allocated"] > 0
            assert stored["trace_0"].shape[1] == 4


def test_cells_without_time_left_are_left_out_and_reported(gpu: Any, tmp_path: Path) -> None:
    # Of 50 seconds 20 are kept for the end, and the first cell may take 45.
    words = ["--dry-run", "--cells", "1", "--advised", "0", "--grid", "lora", "--seconds", "50"]
    printed = printed_by(gpu, tmp_path, *words)
    results = json.loads((tmp_path / "cells.json").read_text())
    assert [row["status"] for row in results["cells"]] == ["skipped: no time left"]
    assert {run["unavailable"] for run in results["overhead"]} == {"skipped: no time left"}
    assert len(results["table2"]) == 2 * 2
    assert {row["measured_problem"] for row in results["table2"]} == {"skipped: no time left"}
    assert [row["problem"] for row in results["finetuning"]] == ["skipped: no time left"] * 2
    assert "skipped: no time left" in printed


def test_a_cell_that_fails_is_reported_and_stops_nothing(gpu: Any, tmp_path: Path) -> None:
    words = ["--timed", "0", "--advised", "0", "--rounds", "0"]
    printed_by(gpu, tmp_path, "--dry-run", "--cells", "1", *words, "--preset", "absent")
    results = json.loads((tmp_path / "cells.json").read_text())
    (cell,) = results["cells"]
    assert cell["status"].startswith('failed: UsageError: target "llama2" has no preset "absent"')
    assert cell["problem"].startswith("prediction UsageError")


def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no CUDA device here" in done.stderr
