"""Table 2 as one JSON value: the output of `memscope profile --grid … --json`, which `memscope report` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from memscope.analysis.grid import Cell, Grid
from memscope.errors import UsageError, excerpt
from memscope.trace import Count, Seconds, SizeBytes, mismatch

__all__ = ["grid_document", "grid_of"]

_SCHEMA_VERSION = 1
_EXPECTED = "expected the output of memscope profile --grid … --json"


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
        "table2": [
            {
                "strategies": plan,
                "applied": dict(zip(grid.factors, cell.applied, strict=True)),
                "samples_per_step": cell.samples_per_step,
                "fits": cell.fits,
                "failure": cell.failure or None,
                "peak": {"allocated": cell.allocated_bytes, "reserved": cell.reserved_bytes},
                "seconds": None if grid.predicted else cell.seconds,
                "estimated_seconds": cell.seconds if grid.predicted else None,
                "trace": str(path) if cell.fits is not None and path.exists() else None,
            }
            for cell, plan, path in zip(grid.cells, plans, paths, strict=True)
        ],
        "notes": list(notes),
    }


class _Device(TypedDict):
    name: str
    simulated: bool


class _Peak(TypedDict):
    allocated: SizeBytes | None
    reserved: SizeBytes | None


class _Cell(TypedDict):
    applied: dict[str, bool]
    samples_per_step: NotRequired[Count | None]
    fits: bool | None
    failure: NotRequired[str | None]
    peak: _Peak
    seconds: Seconds | None
    estimated_seconds: Seconds | None


class _Document(TypedDict):
    schema_version: Count
    target: str
    device: _Device
    memory_limit: SizeBytes | None
    can_be_reserved: SizeBytes | None
    factors: list[str]
    samples: Count
    samples_per_step: NotRequired[Count | None]
    """That of every combination, in documents of before settings could vary."""
    table2: list[_Cell]
    notes: list[str]


def grid_of(document: Mapping[str, Any]) -> tuple[Grid, list[str]]:
    """Table 2 of a document, and its notes.

    Raises:
        UsageError: when a newer memscope wrote it, or a value is missing or has a wrong type.
    """
    version = document.get("schema_version")
    if type(version) is int and version > _SCHEMA_VERSION:
        raise UsageError(
            f"Table 2 written with schema {excerpt(version)}, this memscope reads up to {_SCHEMA_VERSION}: upgrade "
            "memscope"
        )
    damage = mismatch(document, _Document) or next(_without_factor(document), "")
    if damage:
        raise UsageError(f"a damaged Table 2: {damage}; {_EXPECTED}")
    if not document["table2"]:
        raise UsageError(f"Table 2 has no combination: {_EXPECTED}")
    factors, predicted = tuple(document["factors"]), document["device"]["simulated"]
    grid = Grid(
        target=document["target"],
        device=document["device"]["name"],
        predicted=predicted,
        factors=factors,
        cells=tuple(
            _cell({"samples_per_step": document.get("samples_per_step"), **one}, factors, predicted)
            for one in document["table2"]
        ),
        samples=document["samples"],
        memory_bytes=document["memory_limit"],
        limit_bytes=document["can_be_reserved"],
    )
    return grid, list(document["notes"])


def _without_factor(document: Mapping[str, Any]) -> Iterator[str]:
    for place, cell in enumerate(document["table2"]):
        for factor in document["factors"]:
            if factor not in cell["applied"]:
                yield f'table2[{place}].applied does not say whether "{excerpt(factor)}" is'


def _cell(values: Mapping[str, Any], factors: Sequence[str], predicted: bool) -> Cell:
    return Cell(
        applied=tuple(values["applied"][factor] for factor in factors),
        fits=values["fits"],
        allocated_bytes=values["peak"]["allocated"],
        reserved_bytes=values["peak"]["reserved"],
        seconds=values["estimated_seconds" if predicted else "seconds"],
        failure=values.get("failure") or ("" if values["fits"] is not None else "the reason was not noted"),
        samples_per_step=values["samples_per_step"],
    )
