"""How PyTorch was built, as the target's code sees it: with CUDA, also where the installed one is not."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from memscope.simulation.cuda.packaged import cuda_version
from memscope.simulation.facade.stand_in import is_target

__all__ = ["version_says_cuda", "version_says_what_is_installed"]


@contextlib.contextmanager
def version_says_cuda() -> Iterator[None]:
    """Let `torch.version.cuda` be the CUDA of the simulated GPU when a target's code asks."""
    simulated, installed = cuda_version(), torch.version.cuda

    class Version(ModuleType):
        """A module whose attribute depends on the caller."""

        @property
        def cuda(self) -> str | None:
            return simulated if is_target(sys._getframe(1)) else installed

    with _of_class(torch.version, Version):
        yield


@contextlib.contextmanager
def version_says_what_is_installed() -> Iterator[None]:
    """Undo `version_says_cuda` for the duration of the context."""
    with _of_class(torch.version, ModuleType):
        yield


@contextlib.contextmanager
def _of_class(module: ModuleType, kind: type[ModuleType]) -> Iterator[None]:
    before = module.__class__
    module.__class__ = kind  # a property of the class is found before what the module holds
    try:
        yield
    finally:
        module.__class__ = before
