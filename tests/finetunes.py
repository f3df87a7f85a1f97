"""Fine-tuning runs on small models, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memscope.targets.llama2 import target
from memscope.targets.llama2.finetune import main
from memscope.targets.llama2.job import Job
from memscope.targets.llama2.metrics import Metric
from memscope.targets.llama2.target import PRESETS, loss

__all__ = [
    "LORA",
    "TOGETHER",
    "Seen",
    "at_call",
    "job_of",
    "losses",
    "metrics",
    "on_one_thread",
    "refused",
    "run",
    "small",
    "weights_in",
]

LORA = "lora:r=16,alpha=32,dropout=0.05,targets=wq+wv"
TOGETHER = f"{LORA},amp:dtype=bf16,ckpt"


def small(**changed: object) -> list[str]:
    """6 steps of 2 samples on a model with 2 layers of width 32; settings may be changed."""
    settings: dict[str, object] = {"dim": 32, "n_layers": 2, "n_heads": 2, "device": "cpu", "lr": 1e-3}
    settings |= {"accumulation": 2, "samples": 12, "held_out": 2}
    return ["--preset", "debug", *(f"{key}={value}" for key, value in (settings | changed).items())]


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Sums in the same order as in a process of one thread, and no fight for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(*words: str) -> int:
    """The exit code of a run."""
    with pytest.raises(SystemExit) as end:
        main([*words])
    return int(str(end.value.code))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All that was written down."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Of all steps, as they were written down."""
    return [line["loss"] for line in metrics(folder) if "loss" in line]


@dataclass
class Seen:
    """A watch that stops after so many steps."""

    most: int = 10**9
    metrics: list[Metric] = field(default_factory=list)

    def metric(self, metric: Metric) -> None:
        self.metrics.append(metric)

    def stopped(self) -> bool:
        return len(self.metrics) >= self.most


def at_call(monkeypatch: pytest.MonkeyPatch, number: int, do: Any) -> None:
    """Do something the moment the loss is computed for the n-th time; what it gives replaces the loss."""
    calls = iter(range(1, 10**9))

    def watched(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        replaced = do() if next(calls) == number else None
        return value if replaced is None else value * replaced

    monkeypatch.setattr(target, "loss", watched)


def job_of(words: list[str]) -> Job:
    """The job that such words are about."""
    return Job.of(dict(word.split("=", 1) for word in words if "=" in word), PRESETS["debug"])


def weights_in(folder: Path) -> Path:
    """A folder of weights with its tokenizer, trained for a step."""
    assert run(*small(samples=2, held_out=0), "-o", str(folder / "run")) == 0
    return folder / "run" / "weights"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a run says that refuses these words."""
    assert run(*words) == 2
    told = capsys.readouterr().err
    assert told.startswith("memscope: error: ")
    assert "Traceback" not in told
    return told
