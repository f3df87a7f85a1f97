"""Names as people read them: `optimizer state` for the category `optimizer_state`."""

from __future__ import annotations

__all__ = ["spoken"]


def spoken(name: str) -> str:
    """The name of a category or phase, or a text that contains one, with spaces: `optimizer state`, `zero grad`."""
    return name.replace("_", " ")
