"""Pre-training `targets/gpt` on a text, on the CPU: stopping, resuming and refusing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from finetunes import Seen
from safetensors.torch import load_file

from memscope.targets.gpt.config import PRESETS
from memscope.targets.gpt.pretraining import PretrainingJob, prepare_pretraining
from memscope.targets.gpt.train import main
from memscope.targets.training.metrics import Stepped
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.train import train

TEXT = "the cat sat on the mat. " * 30
SMALL = {"dim": "16", "n_heads": "2", "seq_len": "16", "micro_batch": "2", "samples": "12", "held_out": "4"}
WORDS = [f"{key}={value}" for key, value in SMALL.items()]
STRATEGIES = "amp:dtype=bf16"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([*words])
    return int(str(end.value.code))


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    words = ["--preset", "debug", "--data", str(text), "-s", STRATEGIES, "--device", "cpu", *WORDS]
    assert run(*words, "-o", str(whole), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == {"done": 6, "total": 6}
    assert document["perplexity_before"] == pytest.approx(256, rel=0.1), "a model that knows nothing: 256 bytes"
    assert document["perplexity_after"] < document["perplexity_before"]
    assert 0 <= document["token_accuracy"] <= 1

    settings = {**SMALL, "data": str(text), "strategies": STRATEGIES}
    session = prepare_pretraining(PretrainingJob.of(settings, PRESETS["debug"]))
    RunFolder(stopped).begin(session.job.settings)
    seen = Seen(most=2)
    assert not train(session, RunFolder(stopped), seen)
    (stopped / "metrics.jsonl").touch()
    assert run("--resume", str(stopped)) == 0
    one, other = (load_file(folder / "weights" / "model.safetensors") for folder in (whole, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [step.loss for step in seen.metrics if isinstance(step, Stepped)]
    assert losses == [line["loss"] for line in lines if "loss" in line][:2]
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)


def test_a_run_is_not_resumed_with_other_settings(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = prepare_pretraining(PretrainingJob.of({**SMALL, "data": str(text)}, PRESETS["debug"]))
    folder = tmp_path / "run"
    RunFolder(folder).begin(session.job.settings)
    assert not train(session, RunFolder(folder), Seen(most=1))
    assert run("--resume", str(folder), "--set", "n_layers=3") == 2
    assert "n_layers: 2 in the run, 3 given. To resume it, leave out all other options" in capsys.readouterr().err
    text.write_text(TEXT.replace("cat", "dog"))
    assert run("--resume", str(folder)) == 2
    assert "the data have changed since the run began" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no text given: name a text file with --data FILE"),
        (["--data", "TEXT", "--held-out", "45"], "45 are held out, so 0 are left to train on"),
    ],
)
def test_a_run_without_a_text_to_train_on_is_refused(
    words: list[str], said: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(text) if word == "TEXT" else word for word in words]
    shape = ["seq_len=16", "samples=none"]
    assert run("--preset", "debug", *given, "-o", str(tmp_path / "run"), *shape) == 2
    assert said in capsys.readouterr().err
