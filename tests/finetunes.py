"""Fine-tuning runs on small models, in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from memscope.targets.llama2 import target
from memscope.targets.llama2.finetune import main
from memscope.targets.llama2.job import Job
from memscope.targets.llama2.target import PRESETS, loss
from memscope.targets.training.metrics import Metric

__all__ = [
    "LORA",
    "TOGETHER",
    "Seen",
    "at_call",
    "job_of",
    "losses",
    "metrics",
    "refused",
    "run",
    "small",
]

LORA = "lora:r=16,alpha=32,dropout=0.05,targets=wq+wv"
TOGETHER = f"{LORA},amp:dtype=bf16,ckpt"


def small(**changed: object) -> list[str]:
    """Arguments for 6 steps of 2 samples on a model with 2 layers of width 32; `changed` overrides settings."""
    settings: dict[str, object] = {"dim": 32, "n_layers": 2, "n_heads": 2, "device": "cpu", "lr": 1e-3}
    settings |= {"accumulation": 2, "samples": 12, "held_out": 2}
    return ["--preset", "debug", *(f"{key}={value}" for key, value in (settings | changed).items())]


def run(*words: str) -> int:
    """Run the program; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main([*words])
    return int(str(end.value.code))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All metrics that the run wrote."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Losses of all steps, from the metrics."""
    return [line["loss"] for line in metrics(folder) if "loss" in line]


@dataclass
class Seen:
    """A watch that stops after `most` metrics."""

    most: int = 10**9
    metrics: list[Metric] = field(default_factory=list)

    def metric(self, metric: Metric) -> None:
        self.metrics.append(metric)

    def stopped(self) -> bool:
        return len(self.metrics) >= self.most


def at_call(monkeypatch: pytest.MonkeyPatch, number: int, do: Any) -> None:
    """Call `do` when the loss is computed for the n-th time; its result, unless None, multiplies the loss."""
    calls = iter(range(1, 10**9))

    def watched(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        replaced = do() if next(calls) == number else None
        return value if replaced is None else value * replaced

    monkeypatch.setattr(target, "loss", watched)


def job_of(words: list[str]) -> Job:
    """The job that these arguments describe."""
    return Job.of(dict(word.split("=", 1) for word in words if "=" in word), PRESETS["debug"])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a run that refuses these arguments."""
    assert run(*words) == 2
    told = capsys.readouterr().err
    assert told.startswith("memscope: error: ")
    assert "Traceback" not in told
    return told
