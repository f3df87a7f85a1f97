"""What can go wrong, as one tree.

    MemscopeError                exit code 1
    ├── UsageError               2   a wrong name, key, value or combination was given
    ├── TargetError              1   the target's own code failed or cannot be simulated
    ├── TraceFileError           2   a file that was named is missing, foreign, damaged, too new, or cannot be written
    ├── GateFailed               3   a check failed, or nothing fits
    └── OutOfDeviceMemory        4   the target ran out of device memory

Messages are for the person who meets them: what was given, where, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
import importlib.util
import traceback
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "GateFailed",
    "MemscopeError",
    "OutOfDeviceMemory",
    "TargetError",
    "TraceFileError",
    "UsageError",
    "nearest",
    "where",
]

_OWN_FOLDER = str(Path(__file__).parent)
_SHIPPED_TARGETS = str(Path(_OWN_FOLDER) / "targets")
_MOST_NAMES = 3


class MemscopeError(Exception):
    """Any error memscope explains to its user; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(MemscopeError):
    """A name, key, value or combination that cannot be used."""

    exit_code = 2


class TargetError(MemscopeError):
    """The target's own code failed, or does something that cannot be simulated."""


class TraceFileError(MemscopeError):
    """A file that was named cannot be read or written, or is not the kind of file it should be."""

    exit_code = 2


class GateFailed(MemscopeError):
    """A check did not hold, or no plan fits."""

    exit_code = 3


class OutOfDeviceMemory(MemscopeError):
    """The target asked for more memory than the device has."""

    exit_code = 4


def nearest(given: str, valid: Iterable[str]) -> str:
    """`did you mean "x"? ` for the closest valid name, followed by all of them: one sentence for an error message.

    Names that go on from what was given are closer than any other; there may be several.
    """
    names = sorted(valid)
    longer = [name for name in names if given and name.lower().startswith(given.lower())]
    close = longer[:_MOST_NAMES] or difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = "did you mean {}? ".format(" or ".join(f'"{name}"' for name in close)) if close else ""
    return f"{hint}Valid: {', '.join(names) or 'none'}"


def where(error: BaseException) -> str:
    """Where an error came from, as ` (at file:line, in function: code)`.

    The innermost line that is neither PyTorch's nor memscope's own; empty if there is none.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(_SHIPPED_TARGETS)
        or not frame.filename.startswith((_OWN_FOLDER, *_torch_folders(), "<"))
    ]
    return f" (at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line})" if frames else ""


def _torch_folders() -> list[str]:
    found = importlib.util.find_spec("torch")
    return list(found.submodule_search_locations or []) if found else []
