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
import functools
import importlib.util
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
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
    "place",
    "place_of",
    "where",
]

_OWN_FOLDER = str(Path(__file__).parent) + os.sep
_SHIPPED_TARGETS = str(Path(_OWN_FOLDER) / "targets") + os.sep
_STANDARD_LIBRARY = str(Path(os.__file__).parent) + os.sep
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
    """The origin of an error as ` (at file:line, in function: code)`; see `place`."""
    frames = traceback.extract_tb(error.__traceback__)
    return place([(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames)])


def place(frames: Sequence[tuple[str, int, str]]) -> str:
    """The user's own line in a stack as ` (at file:line, in function: code)`; empty if there is none.

    It is the innermost line outside PyTorch, memscope, the standard library and installed packages, or else the
    innermost line outside PyTorch and memscope. The targets that memscope ships count as the user's.

    Args:
        frames: file, line and function of each frame, the innermost first.
    """
    outside = [frame for frame in frames if _is_shipped(frame[0]) or not _is_inside(frame[0])]
    own = [frame for frame in outside if _is_shipped(frame[0]) or not _is_installed(frame[0])]
    for file, line, function in own or outside:
        return f" (at {file}:{line}, in {function}: {linecache.getline(file, line).strip()})"
    return ""


def place_of(function: Callable[..., object]) -> str:
    """Where a function is defined, as ` (at file:line, in name: code)`; empty if it is not written in Python."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return place([(code.co_filename, code.co_firstlineno, code.co_name)]) if code else ""


def _is_shipped(file: str) -> bool:
    return file.startswith(_SHIPPED_TARGETS)


def _is_inside(file: str) -> bool:
    return file.startswith((_OWN_FOLDER, *_torch_folders(), "<"))


def _is_installed(file: str) -> bool:
    return file.startswith((_STANDARD_LIBRARY, *_package_folders()))


def _package_folders() -> list[str]:
    """The folders that pip has installed packages into: it notes each of them in a folder `*.dist-info`."""
    folders = [Path(entry) for entry in sys.path if entry]
    return [f"{folder}{os.sep}" for folder in folders if any(folder.glob("*.dist-info"))]


def _torch_folders() -> list[str]:
    found = importlib.util.find_spec("torch")
    return list(found.submodule_search_locations or []) if found else []
