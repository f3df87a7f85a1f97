"""Errors of fine-tuning, and their messages."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetunes import refused, run, small
from llamas import SMALL, saved

from memscope.targets.llama2.target import SHIPPED_TOKENIZER


def test_nothing_is_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = [*small(samples=2, held_out=0), "-o", str(folder)]
    assert run(*words) == 0
    capsys.readouterr()
    (folder / "notes.txt").write_text("mine")
    before = (folder / "metrics.jsonl").read_bytes()
    assert f"{folder / 'run.json'} already exists: choose another folder with -o, or overwrite" in refused(
        capsys, *words
    )
    assert "no such file" in refused(capsys, *words, "-f", "--data", str(tmp_path / "none.json"))
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert run(*words, "-f", "seed=1") == 0
    assert (folder / "metrics.jsonl").read_bytes() != before
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "Say yes.", "input": "", "output": " "}, 'row 1: "output" is empty'),
        ({"instruction": "Say yes.", "input": "", "output": 3}, 'row 1: "output" is a JSON number, expected text'),
        ({"instruction": "Say yes.", "output": "yes"}, 'row 1: missing field "input"'),
        ("yes", "row 1: a JSON text, expected an object"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    row: object, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    good = {"instruction": "Say no.", "input": "", "output": "no"}
    data.write_text(json.dumps([good, row]))
    assert told in refused(capsys, *small(data=data), "-o", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_held_out_row_that_cannot_be_used_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"
    good = {"instruction": "Say no.", "input": "", "output": "no"}
    data.write_text(json.dumps([good, {**good, "output": ""}]))
    assert 'row 1: "output" is empty' in refused(capsys, *small(data=data, samples=1))


def test_the_model_to_train_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model given: name a folder of weights with --weights" in refused(capsys)


def test_weights_without_a_tokenizer_are_not_trained_on_another_tokenizers_ids(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(base, weights, ignore=shutil.ignore_patterns("tokenizer.model"))
    told = f"weights {weights}: the folder has no tokenizer.model: name the tokenizer with --tokenizer FILE"
    assert told in refused(capsys, "--weights", str(weights))


def test_a_tokenizer_of_another_vocabulary_size_is_refused_only_with_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The shipped tokenizer has 1,024 pieces: fewer than the rows of these weights, so that every id would have one.
    weights = saved(tmp_path / "weights", "huggingface", dataclasses.replace(SMALL, vocab_size=1040))
    shutil.copy(SHIPPED_TOKENIZER, weights / "tokenizer.model")
    told = f"tokenizer {weights / 'tokenizer.model'}: its vocabulary has 1024 tokens, but the model's has 1040: this is"
    assert told in refused(capsys, "--weights", str(weights), "-o", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert run(*small(vocab_size=1040, samples=2, held_out=0), "-o", str(tmp_path / "run")) == 0


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: os.truncate(file, 10_000), "model.safetensors: truncated"),
        (lambda file: file.rename(file.with_name("pytorch_model.bin")), "pytorch_model.bin is not supported"),
    ],
    ids=["truncated", "pickled"],
)
def test_weights_that_cannot_be_used_leave_nothing(
    damage: Callable[[Path], object], told: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(base, weights)
    damage(weights / "model.safetensors")
    assert told in refused(capsys, "--weights", str(weights), "-o", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_plan_that_cannot_be_applied_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small(strategies="lora:targets=wq+wz")
    assert 'targets=wz matches no linear layer of "llama2"' in refused(capsys, *words, "-o", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert "PyTorch finds no GPU on this machine" in refused(capsys, *small(device="cuda"))


def test_a_setting_given_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'setting "lr" is given twice: "0.001" and "1"' in refused(capsys, *small(), "--lr", "1")


@pytest.mark.parametrize("plan", ["lora:dora", "lora:pissa", "peft:ia3"])
def test_adapters_that_cannot_be_saved_are_refused(
    plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *small(samples=2, held_out=0), "--strategies", plan, "-o", str(tmp_path / "run"))
    assert f"{plan}: fine-tuning LLaMA2 saves all weights or plain LoRA updates: use lora without dora" in said
    assert not (tmp_path / "run").exists()
