"""The names of the installed strategies, known without loading them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

__all__ = ["GROUP", "installed_names"]

GROUP = "memscope.strategies"
"""The group of the entry points."""


@cache
def installed_names() -> frozenset[str]:
    """The names; in a plan, a word after a comma that is one of them begins a strategy."""
    return frozenset(entry.name for entry in entry_points(group=GROUP))
