"""What can go wrong, as one tree.

    MemscopeError                exit code 1
    ├── UsageError               2   a wrong name, key, value or combination was given
    ├── TargetError              1   the target's own code failed or cannot be simulated
    ├── TraceFileError           1   a trace file is unreadable, truncated, foreign or too new
    ├── GateFailed               3   a check failed, or nothing fits
    └── OutOfDeviceMemory        4   the target ran out of device memory

Messages are for the person who meets them: what was given, where, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["GateFailed", "MemscopeError", "OutOfDeviceMemory", "TargetError", "TraceFileError", "UsageError", "nearest"]


class MemscopeError(Exception):
    """Any error memscope explains to its user; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(MemscopeError):
    """A name, key, value or combination that cannot be used."""

    exit_code = 2


class TargetError(MemscopeError):
    """The target's own code failed, or does something that cannot be simulated."""


class TraceFileError(MemscopeError):
    """A trace file cannot be read or written."""


class GateFailed(MemscopeError):
    """A check did not hold, or no plan fits."""

    exit_code = 3


class OutOfDeviceMemory(MemscopeError):
    """The target asked for more memory than the device has."""

    exit_code = 4


def nearest(given: str, valid: Iterable[str]) -> str:
    """`did you mean "x"? ` for the closest valid name, followed by all of them: one sentence for an error message."""
    names = sorted(valid)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}Valid: {', '.join(names) or 'none'}"
