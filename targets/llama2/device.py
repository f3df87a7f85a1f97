"""The device that a model is trained or used on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memscope.errors import OutOfDeviceMemory, UsageError, nearest

__all__ = ["default_device", "require_device", "require_known_device", "room_on_device"]

_DEVICES = ("cpu", "cuda")


def default_device() -> str:
    """Cuda where PyTorch has a GPU, cpu elsewhere."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_known_device(device: str) -> None:
    """Refuse anything but cpu and cuda.

    Raises:
        UsageError: says what can be chosen.
    """
    if device not in _DEVICES:
        raise UsageError(f'device "{device}" cannot be used: {nearest(device, _DEVICES)}')


def require_device(device: str) -> None:
    """Refuse a device that this machine does not have, or that is none.

    Raises:
        UsageError: says what can be chosen.
    """
    require_known_device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU on this machine; compute on the CPU with --device cpu")


@contextmanager
def room_on_device(remedy: str) -> Iterator[None]:
    """Tells in words when the GPU runs out of memory, and what to do about it.

    Raises:
        OutOfDeviceMemory: instead of PyTorch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = ". ".join(str(error).split(". ")[:2])
        raise OutOfDeviceMemory(f"the GPU ran out of memory ({what}). {remedy}") from error
