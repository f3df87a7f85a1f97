"""Fine-tuning that is killed, stopped or fails, and is resumed exactly where it was."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetunes import LORA, TOGETHER, Seen, at_call, job_of, losses, metrics, run, small
from llamas import files_no_larger_than
from safetensors.torch import load_file, save_file
from torch import Tensor

from memscope.targets.llama2 import target
from memscope.targets.llama2.session import prepare
from memscope.targets.llama2.target import SHIPPED_DATA, loss
from memscope.targets.training.checkpoints import newest_checkpoint
from memscope.targets.training.metrics import Stepped
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.train import train

# Killed, stopped and failed runs

KILLED_WHILE_SAVING = """
import os, signal, sys
import torch
from memscope.targets.training import checkpoints
from memscope.targets.llama2.finetune import main
saved = torch.save
def save(state, file):
    if state["step"] == 4:
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    saved(state, file)
checkpoints.torch.save = save
main(sys.argv[1:])
"""


def test_a_killed_run_that_is_resumed_has_the_losses_of_one_never_killed(tmp_path: Path) -> None:
    words = small(strategies=TOGETHER, save_every=2)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, *words, "-o", str(killed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert len(losses(killed)) == 4
    last = newest_checkpoint(killed / "checkpoints")
    assert last is not None
    assert last.name == "step-00000002"

    assert run("--resume", str(killed)) == 0
    assert run(*words, "-o", str(whole)) == 0
    assert losses(killed) == losses(whole)  # bit for bit
    assert [line["step"] for line in metrics(killed)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert metrics(killed)[-1] == metrics(whole)[-1]  # the perplexity
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (killed, whole)]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("plan", ["", "amp"], ids=["full", "fp16 with a scaler"])
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_resumes_exactly(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = small(strategies=plan)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    # The model is called for 2 held-out samples, then twice in each step: in the middle of step 2.
    with monkeypatch.context() as patched:
        at_call(patched, 2 + 3, lambda: signal.raise_signal(signal.SIGINT))
        assert run(*words, "-o", str(stopped)) == 130
    told = capfd.readouterr()
    assert told.err.count("stopping after this step, with a checkpoint") == 1
    assert f"2 of 6 steps: loss {losses(stopped)[0]:.4f} at the first" in told.out
    assert f"To resume: python -m memscope.targets.llama2.finetune --resume {stopped}" in told.out

    assert run("--resume", str(stopped)) == 0
    assert run(*words, "-o", str(whole)) == 0
    assert losses(stopped) == losses(whole)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_call(patched, 2 + 5, lambda: math.nan)
        assert run(*small(save_every=1), "-o", str(folder)) == 1
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert "step 3: the loss is nan. A lower --lr" in told
    assert f"The last checkpoint is {folder / 'checkpoints' / 'step-00000002'}; --resume {folder} resumes" in told
    assert "Traceback" not in told

    assert run("--resume", str(folder), "--lr", "1e-4") == 0
    assert "changed from step 3: lr: 0.001 in the run, 0.0001 given" in capsys.readouterr().err
    assert [line["lr"] <= 1e-4 for line in metrics(folder) if "loss" in line] == [False] * 2 + [True] * 4
    assert all(map(math.isfinite, losses(folder)))


class WithoutAGradient(torch.autograd.Function):
    """A function with a finite value and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(target, "loss", lambda model, batch: WithoutAGradient.apply(loss(model, batch)))
    assert run(*small(held_out=0, samples=2), "-o", str(tmp_path / "run")) == 1
    told = capsys.readouterr().err
    assert "step 1: the update produced weights that are not finite, so nothing was saved" in told
    assert "No checkpoint yet" in told
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_step_that_the_gradient_scaler_skips_does_not_end_the_run(tmp_path: Path) -> None:
    session = prepare(job_of(small(strategies="amp")))
    # Far too large for float16, whose largest number is 65504: every gradient overflows.
    session.training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    seen = Seen(most=2)
    before = [parameter.clone() for parameter in session.training.workload.model.parameters()]
    RunFolder(tmp_path).begin(session.job.settings)
    assert not train(session, RunFolder(tmp_path), seen)
    steps = [metric for metric in seen.metrics if isinstance(metric, Stepped)]
    assert [(step.skipped, step.grad_scale) for step in steps] == [(True, 2.0**40), (True, 2.0**39)]
    assert all(map(torch.equal, before, session.training.workload.model.parameters()))


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    full = files_no_larger_than(20_000)
    with monkeypatch.context() as patched:
        at_call(patched, 2 + 5, full.__enter__)
        assert run(*small(save_every=2), "-o", str(folder)) == 1
    full.__exit__(None, None, None)
    told = capsys.readouterr().err
    assert "step-00000004: cannot be written, so nothing was saved; is the disk full?" in told
    assert f"--resume {folder} resumes from it" in told
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert run("--resume", str(folder)) == 0
    assert len(losses(folder)) == 6


def test_a_full_disk_while_the_result_is_saved_leaves_none_and_the_run_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)  # of the tokenizer, when the weights have been written
        assert run(*small(samples=2), "-o", str(folder)) == 1
    told = capsys.readouterr().err
    assert f"{folder / 'weights'}: cannot be written, so nothing was saved; is the disk full?" in told
    assert not list(folder.glob("*weights*"))
    assert run("--resume", str(folder)) == 0
    assert sorted(path.name for path in (folder / "weights").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.model",
    ]  # fmt: skip
    assert [line["step"] for line in metrics(folder)] == [0, 1, 1]


# A resumed run must be the same run


@pytest.fixture
def stopped(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA run on its own data and weights that was stopped after one step."""
    data, weights, folder = tmp_path / "data.json", tmp_path / "weights", tmp_path / "run"
    shutil.copytree(base, weights)
    data.write_text(json.dumps(json.loads(SHIPPED_DATA.read_text(encoding="utf-8"))[:14]), encoding="utf-8")
    with monkeypatch.context() as patched:
        at_call(patched, 2 + 1, lambda: signal.raise_signal(signal.SIGINT))
        assert run(*small(data=data, weights=weights, strategies=LORA), "-o", str(folder)) == 130
    return folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "n_layers=3"], "n_layers: 2 in the run, 3 given"),
        (
            ["--preset", "debug"],
            "dim: 32 in the run, 192 given; n_layers: 2 in the run, 4 given; n_heads: 2 in the run, 6 given",
        ),
        (["-s", "lora:r=8"], "strategies: lora:targets=wq+wv in the run, lora:r=8 given"),
        (["--samples", "13"], "samples: 12 in the run, 13 given"),
        (["--held-out", "3"], "held_out: 2 in the run, 3 given"),
        (["seed=1"], "seed: 0 in the run, 1 given"),
    ],
)
def test_another_model_plan_or_selection_is_refused_by_name(
    words: list[str], told: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--resume", str(stopped), *words) == 2
    error = capsys.readouterr().err
    assert f"{stopped} is another run: {told}" in error
    assert "To resume it, leave out all other options" in error


def test_changed_data_is_noticed(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = stopped.parent / "data.json"
    data.write_text(data.read_text(encoding="utf-8").replace(" the ", " a ", 1), encoding="utf-8")
    assert run("--resume", str(stopped)) == 2
    assert "is of another run: the data have changed since the run began" in capsys.readouterr().err


def test_changed_weights_below_the_updates_are_noticed(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stopped.parent / "weights" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    assert run("--resume", str(stopped)) == 2
    assert "is of another run: the frozen weights have changed" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused_by_name(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = stopped.parent / "other"
    assert run(*small(samples=4, epochs=0.5), "-o", str(other)) == 0
    shutil.copytree(other / "checkpoints" / "step-00000001", stopped / "checkpoints" / "step-00000009")
    capsys.readouterr()
    assert run("--resume", str(stopped)) == 2
    told = capsys.readouterr().err
    assert "step-00000009 is of another run: weights: none in the run," in told
    assert "samples: 4 in the run, 12 given" in told
    assert "strategies: none in the run, lora:targets=wq+wv given" in told


def test_a_run_that_has_no_checkpoint_or_is_over_cannot_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--resume", str(tmp_path)) == 2
    assert "no run to resume: the folder has no run.json" in capsys.readouterr().err

    RunFolder(tmp_path).begin(job_of(small()).settings)
    assert run(*small(), "-o", str(tmp_path)) == 2
    assert f"run.json already exists: resume that run (--resume {tmp_path}), choose" in capsys.readouterr().err
    assert run("--resume", str(tmp_path)) == 2
    assert f"no checkpoint was written yet: start again with -o {tmp_path} -f" in capsys.readouterr().err

    (tmp_path / "adapter").mkdir()
    assert run("--resume", str(tmp_path)) == 2
    assert "this run is finished" in capsys.readouterr().err
    assert run("--resume", str(tmp_path), "-f") == 2
    assert "leave out -o and -f" in capsys.readouterr().err
