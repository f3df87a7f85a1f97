"""Metrics of a run: lines that survive a kill, TensorBoard or a message without it, and the outcome."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llamas import files_no_larger_than
from rich.console import Console

from memscope.errors import MemscopeError
from memscope.targets.training.metrics import Evaluated, Metric, Outcome, Stepped, metrics_written
from memscope.targets.training.watch import _bars, _in_words


def step(number: int, loss: float = 2.0, **values: Any) -> Stepped:
    return Stepped(step=number, epoch=1.0, loss=loss, lr=0.1, tokens=50, seconds=0.5, tokens_per_second=100.0, **values)


def written(folder: Path, metrics: list[Metric], done: int = 0) -> tuple[Path, list[str]]:
    """Write metrics; returns the file and the messages."""
    said: list[str] = []
    file = folder / "metrics.jsonl"
    with metrics_written(file, folder / "board", done, said.append) as write:
        for metric in metrics:
            write(metric)
    return file, said


@pytest.fixture(autouse=True)
def _no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def test_each_metric_is_written_at_once_as_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with metrics_written(file, tmp_path / "board", 0, lambda text: None) as write:
        write(Evaluated(0, 20.5))
        write(step(1, 0.1))
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"step": 0, "perplexity": 20.5}
    assert lines[1]["loss"] == 0.1
    assert "peak_bytes" not in lines[1]  # nothing was measured


def test_a_resumed_run_drops_the_metrics_after_its_checkpoint(tmp_path: Path) -> None:
    file, _ = written(tmp_path, [Evaluated(0, 9.0), step(1), step(2), step(3)])
    file.write_text(file.read_text() + '{"step": 4, "lo')  # killed in the middle of a line
    written(tmp_path, [step(3, 7.0), Evaluated(3, 5.0)], done=2)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert lines[3]["loss"] == 7.0


def test_a_run_that_was_killed_after_its_last_step_is_evaluated_once(tmp_path: Path) -> None:
    written(tmp_path, [Evaluated(0, 9.0), step(1), Evaluated(1, 5.0)])
    file, _ = written(tmp_path, [Evaluated(1, 5.0)], done=1)
    assert len(file.read_text().splitlines()) == 3


def test_missing_tensorboard_is_reported_once(tmp_path: Path) -> None:
    _, said = written(tmp_path, [step(1), step(2)])
    assert said == ["TensorBoard is not installed: metrics go into metrics.jsonl only"]
    assert not (tmp_path / "board").exists()


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    _, said = written(tmp_path, [step(3, 1.5), Evaluated(3, 4.0)], done=2)
    assert said == []
    assert calls[0] == (str(tmp_path / "board"), 3)
    assert ("loss", 1.5, 3) in calls
    assert ("perplexity", 4.0, 3) in calls
    assert calls[-1] == "closed"


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(MemscopeError, match=r"metrics\.jsonl: cannot be written \(File too large\)"),
        files_no_larger_than(500),
    ):
        written(tmp_path, [step(number) for number in range(1, 10)])


def test_the_bar_shows_everything_in_80_columns() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80)
    with _bars(console) as bars:
        measured = _in_words(replace(step(120, 1.12345, peak_bytes=23 * 2**30), tokens_per_second=12_345.0))
        bars.add_task("fine-tuning", total=1000, completed=120, measured=measured)
    shown = out.getvalue()
    assert " 120/1000 steps, loss 1.1235, 12,345 tokens/s, peak 23.0 GiB -:--:--" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_outcome_sums_up_all_steps(tmp_path: Path) -> None:
    file, _ = written(
        tmp_path,
        [
            Evaluated(0, 9.0),
            step(1, 3.0, peak_bytes=10, grad_scale=4.0, skipped=True),
            step(2, 1.0, peak_bytes=8, grad_scale=2.0, skipped=False),
            Evaluated(2, 5.0),
        ],
    )
    assert Outcome.read(file) == Outcome(
        first_loss=3.0,
        last_loss=1.0,
        perplexity_before=9.0,
        perplexity_after=5.0,
        token_accuracy=None,
        seconds=1.0,
        tokens_per_second=100.0,
        peak_bytes=10,
        skipped_steps=1,
    )


def test_values_not_measured_are_absent_from_the_outcome(tmp_path: Path) -> None:
    file, _ = written(tmp_path, [step(1)])
    outcome = Outcome.read(file)
    assert (outcome.perplexity_before, outcome.perplexity_after, outcome.peak_bytes) == (None, None, None)
