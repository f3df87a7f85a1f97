"""CUDA and cuDNN of the GPU that a simulation is of: those of the installed PyTorch, or of its CUDA packages on PyPI.

Source: the requirements of those packages, for Linux on x86.
"""

from __future__ import annotations

import torch

__all__ = ["cuda_version", "cudnn_version", "torch_version"]

_CUDA = {(2, 6): "12.4", (2, 7): "12.6", (2, 8): "12.8", (2, 11): "13.0", (2, 15): "13.2"}
"""First version of PyTorch → version of the CUDA toolkit."""
_CUDNN = {
    (2, 6): 9_01_00, (2, 7): 9_05_01, (2, 8): 9_10_02, (2, 11): 9_19_00, (2, 12): 9_20_00, (2, 14): 9_24_00,
    (2, 15): 9_26_00,
}  # fmt: skip
"""First version of PyTorch → version of cuDNN, in the encoding of `torch.backends.cudnn.version()`: 92000 is 9.20.0."""


def torch_version() -> tuple[int, int]:
    """Version of the installed PyTorch (major, minor)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def cuda_version() -> str:
    """Version of CUDA as `torch.version.cuda` gives it, such as `13.0`."""
    own: str | None = torch.version.cuda
    return own or [cuda for since, cuda in _CUDA.items() if since <= torch_version()][-1]


def cudnn_version() -> int:
    """Version of cuDNN as `torch.backends.cudnn.version()` gives it."""
    own: int | None = torch.backends.cudnn.version()
    return own or [cudnn for since, cudnn in _CUDNN.items() if since <= torch_version()][-1]
