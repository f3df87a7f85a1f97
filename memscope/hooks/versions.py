"""The versions of the libraries that decide the sizes in a trace."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from memscope.trace.notes import add_note

__all__ = ["NEWEST_TESTED_TORCH", "note_untested", "versions"]

NEWEST_TESTED_TORCH = (2, 15)
"""Major and minor version of the newest PyTorch that memscope's tests have run with."""

_LIBRARIES = ("transformers", "peft", "bitsandbytes")
"""Libraries beside PyTorch that implement models, adapters, optimizers or quantized weights."""


def versions() -> dict[str, str]:
    """The versions of PyTorch and Python, and of each of the other libraries that the program has imported."""
    found = {"torch": str(torch.__version__), "python": platform.python_version()}
    for name in _LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found


def note_untested(meta: dict[str, Any]) -> None:
    """Add a note to a trace's metadata if PyTorch is newer than the newest one that memscope was tested with."""
    installed = tuple(map(int, torch.__version__.split(".")[:2]))
    if installed > NEWEST_TESTED_TORCH:
        newest = ".".join(map(str, NEWEST_TESTED_TORCH))
        add_note(
            meta,
            f"PyTorch {torch.__version__} is newer than {newest}, the newest one that this memscope was tested with: "
            "look for a newer memscope, or compare with a real run (--device cpu or cuda)",
        )
