"""Checkpoints: complete or absent, the newest ones kept, foreign files refused."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import files_no_larger_than
from torch import nn

from memscope.errors import MemscopeError, UsageError
from memscope.targets.training.checkpoints import load_checkpoint, newest_checkpoint, restore, save_checkpoint
from memscope.workload.description import StepPlan, Workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step


def training(*, seed: int = 0, width: int = 8, scaler: bool = False) -> Training:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))
    workload = Workload(
        model=model,
        batches=[torch.ones(2, 4)],
        loss=lambda model, x: model(x).square().mean(),
        optimizer_factory=partial(torch.optim.AdamW, lr=0.1),
        plan=StepPlan(grad_scaler=scaler),
    )
    return Training.start(workload, "cpu", lambda data: data)


def steps(of: Training, count: int) -> list[float]:
    return [run_step(of, micro_batches(of.workload, of.workload.batches[0])).item() for _ in range(count)]


def saved(folder: Path, step: int = 1, of: Training | None = None, *, keep: int = 2) -> Path:
    return save_checkpoint(folder, of or training(), step, {"note": "mine"}, keep=keep)


@pytest.mark.parametrize("scaler", [False, True])
def test_a_restored_training_continues_exactly_where_it_was_saved(scaler: bool, tmp_path: Path) -> None:
    first = training(scaler=scaler)
    steps(first, 3)
    if first.scaler:
        first.scaler.update(8.0)  # another scale than the initial one
    path = saved(tmp_path, 3, first)
    drawn = random.random()
    expected = steps(first, 3)

    other = training(seed=1, scaler=scaler)
    restore(other, load_checkpoint(path), path)
    assert random.random() == drawn
    assert other.scaler is None or other.scaler.get_scale() == 8.0
    assert steps(other, 3) == expected  # dropout samples the same numbers, AdamW has the same moments


def test_values_saved_about_a_checkpoint_are_loaded_with_it(tmp_path: Path) -> None:
    state = load_checkpoint(saved(tmp_path, 7))
    assert (state["step"], state["note"]) == (7, "mine")


def test_frozen_weights_are_not_saved(tmp_path: Path) -> None:
    frozen = training()
    frozen.workload.model[0].requires_grad_(False)  # type: ignore[index, union-attr, operator]
    state = load_checkpoint(saved(tmp_path, of=frozen))
    assert set(state["training"]["trained"]) == {"2.weight", "2.bias"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        saved(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000100"


def test_a_full_disk_leaves_the_checkpoints_that_are_there(tmp_path: Path) -> None:
    first = saved(tmp_path, 1, keep=1)
    large = training(width=10_000)
    with (
        files_no_larger_than(50_000),
        pytest.raises(MemscopeError, match="nothing was saved; is the disk full"),
    ):
        saved(tmp_path, 2, large, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert load_checkpoint(first)["step"] == 1


def test_leftovers_of_a_killed_process_are_not_checkpoints_and_are_removed(tmp_path: Path) -> None:
    whole = saved(tmp_path, 1)
    half = tmp_path / ".step-00000002.4711"  # killed while it was written
    half.mkdir()
    (half / "state.pt").write_bytes(b"half of it")
    (tmp_path / "step-00000000").mkdir()  # killed while it was removed
    assert newest_checkpoint(tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_a_missing_folder_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None


class MakesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1000]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"no zip file"),
        lambda file: torch.save({"step": MakesAFile(file.with_name("made by code"))}, file),
        lambda file: torch.save([1, 2], file),
        lambda file: file.unlink(),
    ],
    ids=["truncated", "empty", "foreign", "with code", "something else", "missing"],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_never_run(damage: Any, tmp_path: Path) -> None:
    path = saved(tmp_path)
    damage(path / "state.pt")
    with pytest.raises(
        UsageError, match=r"step-00000001: damaged, or not a checkpoint .*resume from the checkpoint before it"
    ):
        load_checkpoint(path)
    assert not (path / "made by code").exists()


def test_a_checkpoint_of_other_weights_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(
        UsageError, match=r"other trained weights than in this run, or other shapes: 0\.bias, 0\.weight, 2\.weight$"
    ):
        restore(training(width=9), load_checkpoint(path), path)
