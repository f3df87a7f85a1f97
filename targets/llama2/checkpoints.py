"""Checkpoints of a run: what was trained, the optimizer, and all else that the next step depends on.

A checkpoint is a folder `step-00000100` with one file; it appears when it is complete, and older ones go after that.
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
from memscope.targets.llama2.files import listed, new_folder
from memscope.workload.step import Training

__all__ = ["load_checkpoint", "newest_checkpoint", "restore", "save_checkpoint"]

_FILE = "state.pt"


def save_checkpoint(folder: Path, training: Training, step: int, about: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`; one that is there already stays as it is.

    Frozen weights are left out: they are where they came from. Random state is that of Python and PyTorch.

    Args:
        folder: where the checkpoints of the run are; it exists.
        training: what is saved.
        step: optimizer steps that have been done.
        about: what else `load_checkpoint` gives back: numbers, text, lists and dicts.
        keep: number of checkpoints that remain.

    Raises:
        MemscopeError: when the disk is full or cannot be written; what was there is still there.
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
    """The newest whole checkpoint; what is left of others, whose writing or removal was interrupted, is removed."""
    whole = _whole(folder)
    for leftover in {*folder.glob(".step-*"), *folder.glob("step-*")} - {*whole}:
        shutil.rmtree(leftover)
    return whole[-1] if whole else None


def _whole(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(file.parent for file in folder.glob(f"step-*/{_FILE}"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, its tensors mapped from the file; pickled code is refused, never run.

    Raises:
        UsageError: when it is damaged or something else.
    """
    try:
        state: dict[str, Any] = torch.load(path / _FILE, map_location="cpu", weights_only=True, mmap=True)
        if not (isinstance(state, dict) and {"step", "training", "random"} <= state.keys()):
            raise ValueError("it holds something else")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"checkpoint {path}: damaged, or no checkpoint ({_first_line(error)}): "
            "remove this folder to go on from the one before it"
        ) from None
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def restore(training: Training, state: dict[str, Any], path: Path) -> None:
    """Put a training that has just been started where it was when the checkpoint was saved.

    Raises:
        UsageError: when the checkpoint is of a model in which other weights are trained.
    """
    parts, trained = state["training"], _trained(training)
    there = {name: tuple(value.shape) for name, value in parts["trained"].items()}
    here = {name: tuple(value.shape) for name, value in trained.items()}
    differing = {name for name in there.keys() | here.keys() if there.get(name) != here.get(name)}
    if differing:
        raise UsageError(
            f"checkpoint {path}: trained there or here, not in both or of another shape: {listed(differing)}"
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
