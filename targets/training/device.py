"""The device for training or generation: cpu or cuda."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memscope.errors import OutOfDeviceMemory, UsageError, nearest

__all__ = ["default_device", "require_device", "require_known_device", "room_on_device"]

_DEVICES = ("cpu", "cuda")


def default_device() -> str:
    """`cuda` if PyTorch finds a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_known_device(device: str) -> None:
    """Refuse any device but cpu and cuda.

    Raises:
        UsageError: the device is unknown; the message names the valid ones.
    """
    if device not in _DEVICES:
        raise UsageError(f'unknown device "{device}": {nearest(device, _DEVICES)}')


def require_device(device: str) -> None:
    """Refuse a device that is unknown or that this machine does not have.

    Raises:
        UsageError: the device cannot be used; the message names one that can.
    """
    require_known_device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU on this machine; to use the CPU: --device cpu")


@contextmanager
def room_on_device(remedy: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error into a message that ends with `remedy`.

    Raises:
        OutOfDeviceMemory: the GPU ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = ". ".join(str(error).split(". ")[:2])
        raise OutOfDeviceMemory(f"the GPU ran out of memory ({what}). {remedy}") from error
