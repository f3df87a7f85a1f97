"""The files of `memscope report`: traces, checkpoint plans and Table 2, recognized by their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscope.analysis.grid import Grid
from memscope.cli.grid_document import grid_of
from memscope.errors import UsageError
from memscope.trace import read_json

__all__ = ["GivenFiles", "GivenGrid", "files_by_kind"]

_EXPECTED = (
    "expected a trace, a checkpoint plan of memscope advise, or Table 2, the output of memscope profile --grid … --json"
)


@dataclass(frozen=True)
class GivenGrid:
    """A file with Table 2: its JSON document and its value."""

    path: Path
    document: dict[str, Any]
    grid: Grid
    notes: list[str]


@dataclass(frozen=True)
class GivenFiles:
    """The files of a report by kind, each in the order of the command line."""

    traces: tuple[Path, ...]
    plans: tuple[Path, ...]
    grids: tuple[GivenGrid, ...]


def files_by_kind(files: Sequence[Path]) -> GivenFiles:
    """Sort files by kind. A file that is not JSON counts as a trace: loading it reports what is wrong with it.

    Raises:
        UsageError: when a JSON file is damaged, or neither a checkpoint plan nor Table 2.
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
    return GivenFiles(tuple(traces), tuple(plans), tuple(grids))


def _json_of(path: Path) -> Any:
    """The content of a JSON file; None for any other file."""
    try:
        with open(path, "rb") as opened:
            beginning = opened.read(64).lstrip()
        if not (path.suffix.lower() == ".json" or beginning[:1] in (b"{", b"[")):
            return None
        return read_json(path)
    except OSError:
        return None  # loading the trace reports why
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: truncated or damaged JSON ({error}); {_EXPECTED}") from None
