"""The tree of memscope's errors.

    MemscopeError                exit code 1
    ├── UsageError               2   a name, key, value or combination is wrong
    ├── TargetError              1   the target's own code failed or cannot be simulated
    ├── TraceFileError           2   a file that was named is missing, foreign, damaged, too new, or cannot be written
    ├── GateFailed               3   a check failed, or nothing fits
    └── OutOfDeviceMemory        4   the target ran out of device memory

A message tells the user what was given and where, what was expected, and what to do next.
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
    "excerpt",
    "nearest",
    "where",
]

_OWN_FOLDER = str(Path(__file__).parent)
_SHIPPED_TARGETS = str(Path(_OWN_FOLDER) / "targets")
_MOST_NAMES = 3
_MOST_CHARACTERS = 60


class MemscopeError(Exception):
    """Base class of the errors that memscope explains to its user; `exit_code` is the exit code of the command."""

    exit_code = 1


class UsageError(MemscopeError):
    """A name, key, value or combination that cannot be used."""

    exit_code = 2


class TargetError(MemscopeError):
    """The target's own code failed or cannot be simulated."""


class TraceFileError(MemscopeError):
    """A file that was named cannot be read or written, or is not the kind of file it should be."""

    exit_code = 2


class GateFailed(MemscopeError):
    """A check failed, or no plan fits."""

    exit_code = 3


class OutOfDeviceMemory(MemscopeError):
    """The target ran out of device memory."""

    exit_code = 4


def excerpt(value: object) -> str:
    """A value as an error message shows it: as it is, or its first 60 characters and `…`, on one line."""
    text = value if isinstance(value, str) else _shown(value)
    first = text[: _MOST_CHARACTERS + 1]
    if not first.isprintable():
        first = first.encode("unicode_escape").decode()
    return first if len(first) <= _MOST_CHARACTERS else f"{first[:_MOST_CHARACTERS]}…"


def _shown(value: object) -> str:
    """The `repr` of a value from a file; of a nested value, only the type and the length."""
    if isinstance(value, int) and abs(value) >= 10**_MOST_CHARACTERS:
        return "a number of more than 60 digits"
    if isinstance(value, (dict, list, tuple)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}" if value else f"an empty {kind.split()[1]}"
    return repr(value[: _MOST_CHARACTERS + 1] if isinstance(value, (str, bytes)) else value)


def nearest(given: str, valid: Iterable[str]) -> str:
    """The closest valid names, then all of them, for an error message: `did you mean "x"? Valid: x, y`.

    Names that begin with the given text are preferred; up to three of them are offered.
    """
    names = sorted(valid)
    longer = [name for name in names if given and name.lower().startswith(given.lower())]
    close = longer[:_MOST_NAMES] or difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = "did you mean {}? ".format(" or ".join(f'"{name}"' for name in close)) if close else ""
    return f"{hint}Valid: {', '.join(names) or 'none'}"


def where(error: BaseException) -> str:
    """The origin of an error as ` (at file:line, in function: code)`.

    This is the innermost line outside PyTorch and memscope; the targets that memscope ships count as outside. The text
    is empty if there is no such line.
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
