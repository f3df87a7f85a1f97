"""TorchScript in a simulated program: scripted functions and modules run as the Python that they were made from.

TorchScript holds weights in objects of its own, which cannot hold a simulation's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memscope.simulation.facade.stand_in import replaced

__all__ = ["scripts_run_as_python"]

_NOTE = (
    "the program uses TorchScript, but its scripted functions and modules ran as the Python that they were made from: "
    "TorchScript may fuse operators, and memory is then lower"
)


@contextlib.contextmanager
def scripts_run_as_python(note: Callable[[str], None]) -> Iterator[None]:
    """Make `torch.jit.script` and `torch.jit.trace` return what they are given; `note` is told."""

    def unchanged(obj: Any, *args: Any, **kwargs: Any) -> Any:
        note(_NOTE)
        return obj

    with replaced(torch.jit, "script", unchanged), replaced(torch.jit, "trace", unchanged):
        yield
