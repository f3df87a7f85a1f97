"""Notes of a trace: texts in `meta["notes"]` that the tables, the page and JSON show."""

from __future__ import annotations

from typing import Any

__all__ = ["add_note"]


def add_note(meta: dict[str, Any], text: str) -> None:
    """Append a note to a trace's metadata, once."""
    notes = meta.setdefault("notes", [])
    if text not in notes:
        notes.append(text)
