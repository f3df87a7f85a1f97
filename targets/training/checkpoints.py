"""Checkpoints of a run: the trained weights, the optimizer state, and everything else the next step depends on.

A checkpoint is a folder `step-00000100` with one file. It appears only when it is complete; older checkpoints are
removed after that.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from memscope.errors import UsageError
from memscope.targets.training.files import listed, new_folder
from memscope.workload.step import Training

__all__ = ["load_checkpoint", "newest_checkpoint", "restore", "save_checkpoint"]

_FILE = "state.pt"


def save_checkpoint(folder: Path, training: Training, step: int, about: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, unless the step already has one, then remove all but the newest `keep`.

    Frozen weights are left out: a resumed run loads them from their source. Random state is that of Python and PyTorch.

    Args:
        folder: the existing folder of the run's checkpoints.
        training: the training to save.
        step: optimizer steps done.
        about: further values for `load_checkpoint` to return: numbers, text, lists and dicts.
        keep: number of checkpoints that remain.

    Raises:
        MemscopeError: the disk is full or cannot be written; existing checkpoints are kept.
    """
    path = folder / f"step-{step:08}"
    if not path.exists():
        state = {**about, "step": step, "training": _state(training), "random": _random_state(training.device_type)}
        with new_folder(path) as unfinished, (unfinished / _FILE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    for old in _whole(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. Removes the remains of checkpoints whose writing or removal was interrupted."""
    whole = _whole(folder)
    for leftover in {*folder.glob(".step-*"), *folder.glob("step-*")} - {*whole}:
        shutil.rmtree(leftover)
    return whole[-1] if whole else None


def _whole(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(file.parent for file in folder.glob(f"step-*/{_FILE}"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Its tensors are mapped from the file; pickled code is refused, never run.

    Raises:
        UsageError: the file is damaged or is not a checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(path / _FILE, map_location="cpu", weights_only=True, mmap=True)
        if not (isinstance(state, dict) and {"step", "training", "random"} <= state.keys()):
            raise ValueError("its contents are not those of a checkpoint")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"checkpoint {path}: damaged, or not a checkpoint ({_first_line(error)}): "
            "remove this folder to resume from the checkpoint before it"
        ) from None
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def restore(training: Training, state: dict[str, Any], path: Path) -> None:
    """Restore the state of a checkpoint into a training that has just been started.

    Raises:
        UsageError: the checkpoint is of a model with other trained weights.
    """
    parts, trained = state["training"], _trained(training)
    there = {name: tuple(value.shape) for name, value in parts["trained"].items()}
    here = {name: tuple(value.shape) for name, value in trained.items()}
    differing = {name for name in there.keys() | here.keys() if there.get(name) != here.get(name)}
    if differing:
        raise UsageError(
            f"checkpoint {path}: other trained weights than in this run, or other shapes: {listed(differing)}"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(parts["trained"][name])
    training.optimizer.load_state_dict(parts["optimizer"])
    if training.scaler:
        training.scaler.load_state_dict(parts["scaler"])
    random.setstate(state["random"]["python"])
    torch.set_rng_state(state["random"]["cpu"])
    if training.device_type == "cuda":
        torch.cuda.set_rng_state(state["random"]["cuda"])


def _state(training: Training) -> dict[str, Any]:
    return {
        "trained": {name: parameter.detach() for name, parameter in _trained(training).items()},
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict() if training.scaler else None,
    }


def _trained(training: Training) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in training.workload.model.named_parameters() if p.requires_grad}


def _random_state(device_type: str) -> dict[str, Any]:
    state = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if device_type == "cuda" else state
