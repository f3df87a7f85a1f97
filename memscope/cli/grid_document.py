"""Table 2 as one JSON value: the output of `memscope profile --grid … --json`, which `memscope report` reads."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memscope.analysis.grid import Cell, Grid
from memscope.errors import UsageError

__all__ = ["grid_document", "grid_of"]

_SCHEMA_VERSION = 1


def grid_document(
    grid: Grid, plans: Sequence[Sequence[str]], paths: Sequence[Path], notes: Sequence[str]
) -> dict[str, Any]:
    """Table 2 as a JSON value, sizes in bytes; `paths` of traces that do not exist are null."""
    return {
        "schema_version": _SCHEMA_VERSION,
        "target": grid.target,
        "device": {"name": grid.device, "simulated": grid.predicted},
        "memory_limit": grid.memory_bytes,
        "can_be_reserved": grid.limit_bytes,
        "factors": list(grid.factors),
        "samples": grid.samples,
        "samples_per_step": grid.samples_per_step,
        "table2": [
            {
                "strategies": plan,
                "applied": dict(zip(grid.factors, cell.applied, strict=True)),
                "fits": cell.fits,
                "peak": {"allocated": cell.allocated_bytes, "reserved": cell.reserved_bytes},
                "seconds": None if grid.predicted else cell.seconds,
                "estimated_seconds": cell.seconds if grid.predicted else None,
                "trace": str(path) if path.exists() else None,
            }
            for cell, plan, path in zip(grid.cells, plans, paths, strict=True)
        ],
        "notes": list(notes),
    }


def grid_of(document: Mapping[str, Any]) -> tuple[Grid, list[str]]:
    """Table 2 of a document, and its notes.

    Raises:
        UsageError: when a newer memscope wrote it, or a value is missing or has a wrong type.
    """
    version = document.get("schema_version")
    if isinstance(version, int) and version > _SCHEMA_VERSION:
        raise UsageError(
            f"Table 2 written with schema {version}, this memscope reads up to {_SCHEMA_VERSION}: upgrade memscope"
        )
    try:
        factors = tuple(map(str, document["factors"]))
        predicted = bool(document["device"]["simulated"])
        grid = Grid(
            target=str(document["target"]),
            device=str(document["device"]["name"]),
            predicted=predicted,
            factors=factors,
            cells=tuple(_cell(one, factors, predicted) for one in document["table2"]),
            samples=operator.index(document["samples"]),
            memory_bytes=_whole(document["memory_limit"]),
            limit_bytes=_whole(document["can_be_reserved"]),
            samples_per_step=_whole(document["samples_per_step"]),
        )
        notes = [str(note) for note in document["notes"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"a damaged Table 2 ({type(error).__name__}: {error}): expected the output of memscope profile --grid … "
            "--json"
        ) from None
    if not grid.cells:
        raise UsageError("Table 2 has no combination: expected the output of memscope profile --grid … --json")
    return grid, notes


def _cell(values: Mapping[str, Any], factors: Sequence[str], predicted: bool) -> Cell:
    seconds = values["estimated_seconds" if predicted else "seconds"]
    return Cell(
        applied=tuple(bool(values["applied"][factor]) for factor in factors),
        fits=bool(values["fits"]),
        allocated_bytes=_whole(values["peak"]["allocated"]),
        reserved_bytes=_whole(values["peak"]["reserved"]),
        seconds=None if seconds is None else float(seconds),
    )


def _whole(value: Any) -> int | None:
    return None if value is None else operator.index(value)
