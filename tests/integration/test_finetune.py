"""Fine-tuning: the losses, the saved result, and perplexity."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetunes import LORA, TOGETHER, Seen, job_of, losses, metrics, run, small
from torch import nn

from memscope.targets.llama2.adapters import load_adapter
from memscope.targets.llama2.evaluation import perplexity
from memscope.targets.llama2.job import Job
from memscope.targets.llama2.session import prepare, shortfalls
from memscope.targets.llama2.target import PRESETS, SHIPPED_TOKENIZER, build_on, read_preset, read_samples
from memscope.targets.training.checkpoints import load_checkpoint
from memscope.targets.training.metrics import Stepped
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.train import train

# Learning


def losses_of(plan: str, lr: float, folder: Path) -> list[float]:
    """Losses of 16 steps of 4 samples: 4 epochs of the first 16 shipped instructions, debug preset, random weights."""
    settings = {"samples": "16", "accumulation": "4", "epochs": "4", "schedule": "constant", "held_out": "0"}
    session = prepare(Job.of({**settings, "lr": str(lr), "strategies": plan}, PRESETS["debug"]))
    seen = Seen()
    RunFolder(folder).begin(session.job.settings)
    train(session, RunFolder(folder), seen)
    assert len(seen.metrics) == 16
    return [metric.loss for metric in seen.metrics if isinstance(metric, Stepped)]


GUESS = math.log(1024)  # the loss of a model that gives all tokens of the vocabulary the same probability


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses_of("", 3e-3, tmp_path_factory.mktemp("full"))


def test_all_weights_learn_to_half_of_a_guess_within_16_steps(full: list[float]) -> None:
    assert full[0] == pytest.approx(GUESS, rel=0.05)
    assert sum(full[-4:]) / 4 < GUESS / 2


def test_bf16_learns_as_well(full: list[float], tmp_path: Path) -> None:
    assert sum(losses_of("amp:dtype=bf16", 3e-3, tmp_path)[-4:]) / 4 == pytest.approx(sum(full[-4:]) / 4, rel=0.05)


def test_checkpointing_changes_no_loss(full: list[float], tmp_path: Path) -> None:
    assert losses_of("ckpt", 3e-3, tmp_path) == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize("plan", [LORA, TOGETHER], ids=["lora", "all together"])
def test_lora_on_a_random_model_gets_below_a_guess(plan: str, tmp_path: Path) -> None:
    # Embedding and head stay random and frozen, so the loss falls only a little below a guess.
    found = losses_of(plan, 3e-2, tmp_path)
    assert found[0] > GUESS
    assert sum(found[-4:]) / 4 < GUESS - 0.4


# The result


def test_the_document_describes_the_run_and_the_saved_weights_are_the_trained_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*small(epochs=2, keep=1, save_every=4, format="meta"), "-o", str(folder), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["steps"] == {"done": 12, "total": 12}
    assert document["samples"] == {"trained": 12, "held_out": 2}
    assert document["first_loss"] == losses(folder)[0]
    assert document["last_loss"] == losses(folder)[-1]
    assert document["perplexity_after"] < document["perplexity_before"]
    assert (document["peak_bytes"], document["skipped_steps"]) == (None, 0)
    assert document["saved"] == str(folder / "weights")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl", "run.json", "weights"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000012"]
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["epoch"] for line in lines] == pytest.approx([(step + 1) / 6 for step in range(12)])
    assert sum(line["tokens"] for line in lines[:6]) == sum(line["tokens"] for line in lines[6:])  # the same samples

    config = read_preset(folder / "weights")
    trained = build_on(read_samples(replace(config, samples=1)), replace(config, weights=str(folder / "weights"))).model
    state = load_checkpoint(folder / "checkpoints" / "step-00000012")["training"]["trained"]
    assert all(torch.equal(value, state[name]) for name, value in trained.named_parameters())
    assert (folder / "weights" / "tokenizer.model").read_bytes() == SHIPPED_TOKENIZER.read_bytes()


def test_a_saved_adapter_on_its_base_gives_the_perplexity_that_was_measured(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    # The base was trained with the shipped tokenizer, which was saved in its folder and is found there.
    words = ["--weights", str(base), "-s", LORA, "samples=4", "accumulation=2", "held_out=2", "lr=0.1", "device=cpu"]
    assert run(*words, "-o", str(folder)) == 0
    told = capsys.readouterr().out
    assert f"generate --weights {base} --adapter {folder / 'adapter'} --instruction" in told
    measured = [line["perplexity"] for line in metrics(folder) if "perplexity" in line]

    session = prepare(replace(Job.of(RunFolder(folder).read_settings()), plan=""))
    assert perplexity(session.training, session.held_out) == pytest.approx(measured[0], rel=1e-6)
    load_adapter(session.training.workload.model, folder / "adapter")
    assert perplexity(session.training, session.held_out) == pytest.approx(measured[1], rel=1e-6)
    assert measured[0] != measured[1]


def test_a_model_that_guesses_has_the_perplexity_of_its_vocabulary() -> None:
    session = prepare(job_of(small(strategies=LORA)))
    model = session.training.workload.model
    nn.init.zeros_(model.output.weight)
    drawn = torch.get_rng_state()
    assert perplexity(session.training, session.held_out) == pytest.approx(1024, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training


def test_held_out_samples_are_the_rows_after_those_trained_on() -> None:
    session = prepare(job_of(small(samples=3, held_out=2)))
    assert session.samples + session.held_out == read_samples(replace(session.job.config, samples=5))


@pytest.mark.parametrize(
    ("samples", "held_out", "said"),  # 64 rows are shipped
    [
        (62, 2, []),
        (62, 3, ["the data has 2 rows after these 62 samples, fewer than held_out=3"]),
        (64, 2, ["the data has no rows after these 64 samples to hold out"]),
        (65, 0, ["the data has 64 rows, fewer than samples=65: all of them are trained on"]),
    ],
)
def test_data_with_fewer_rows_than_asked_for_is_told(samples: int, held_out: int, said: list[str]) -> None:
    session = prepare(job_of(small(samples=samples, held_out=held_out)))
    found = list(shortfalls(session))
    assert len(found) == len(said)
    assert all(one.startswith(start) for one, start in zip(found, said, strict=True))
