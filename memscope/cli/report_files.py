"""What `memscope report` is given: traces, checkpoint plans and Table 2, told apart by what is in the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscope.analysis.grid import Grid
from memscope.cli.grid_document import grid_of
from memscope.errors import UsageError

__all__ = ["Given", "GivenGrid", "told_apart"]

_EXPECTED = (
    "expected a trace, a checkpoint plan as memscope advise writes it, or Table 2 as memscope profile --grid … --json "
    "prints it"
)


@dataclass(frozen=True)
class GivenGrid:
    """Table 2 of a file, as a document and as a value."""

    path: Path
    document: dict[str, Any]
    grid: Grid
    notes: list[str]


@dataclass(frozen=True)
class Given:
    """The files of a report, each kind in the order it was named."""

    traces: tuple[Path, ...]
    plans: tuple[Path, ...]
    grids: tuple[GivenGrid, ...]


def told_apart(files: Sequence[Path]) -> Given:
    """Which of the files is what. What is no JSON counts as a trace: loading it says what is wrong with it.

    Raises:
        UsageError: when a JSON file is damaged, or is neither a checkpoint plan nor Table 2.
    """
    traces, plans, grids = list[Path](), list[Path](), list[GivenGrid]()
    for path in files:
        document = _json_of(path)
        match document:
            case None:
                traces.append(path)
            case {"table2": _}:
                try:
                    grid, notes = grid_of(document)
                except UsageError as error:
                    raise UsageError(f"{path}: {error}") from None
                grids.append(GivenGrid(path, document, grid, notes))
            case {"format": _, "layers": _}:
                plans.append(path)
            case _:
                raise UsageError(f"{path}: neither a checkpoint plan nor Table 2: {_EXPECTED}")
    return Given(tuple(traces), tuple(plans), tuple(grids))


def _json_of(path: Path) -> Any:
    """What a JSON file holds; None where the file is none."""
    try:
        with open(path, "rb") as opened:
            beginning = opened.read(64).lstrip()
            if not (path.suffix.lower() == ".json" or beginning[:1] in (b"{", b"[")):
                return None
            opened.seek(0)
            return json.loads(opened.read())
    except OSError:
        return None  # loading it says why
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: truncated or damaged JSON ({error}); {_EXPECTED}") from None
