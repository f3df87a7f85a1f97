"""Traces as tables with one row per allocation: `memscope export --to csv` or `parquet`."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from memscope.errors import UsageError
from memscope.trace import CATEGORIES, PHASES, Ints, Progress, Trace, no_progress

__all__ = ["csv_bytes", "parquet_bytes"]

_NUMBERS: Mapping[str, str] = {
    "size_bytes": "size",
    "requested_bytes": "requested",
    "step": "step",
    "micro_batch": "micro_batch",
    "born_event": "born",
    "freed_event": "freed",
}
"""Numeric column → column of the trace; `freed_event` is empty for allocations that are alive at the end."""


def csv_bytes(trace: Trace, progress: Progress = no_progress) -> bytes:
    """Return a CSV file of the trace, in UTF-8, with a header row."""
    progress("writing", 0, 1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_NUMBERS, *_names(trace)])
    numbers = [getattr(trace, column).tolist() for column in _NUMBERS.values()]
    numbers[-1] = [event if event >= 0 else "" for event in numbers[-1]]
    names = [[table[code] for code in codes.tolist()] for codes, table in _names(trace).values()]
    writer.writerows(zip(*numbers, *names, strict=True))
    return text.getvalue().encode("utf-8", "replace")


def parquet_bytes(trace: Trace, progress: Progress = no_progress) -> bytes:
    """Return a Parquet file of the trace.

    Names are dictionary-encoded. The schema's metadata holds the trace's metadata as JSON under "memscope".

    Raises:
        UsageError: pyarrow is not installed.
    """
    arrow, parquet = _pyarrow()
    progress("writing", 0, 1)
    columns: dict[str, Any] = {name: arrow.array(getattr(trace, column)) for name, column in _NUMBERS.items()}
    columns["freed_event"] = arrow.array(trace.freed, mask=trace.freed < 0)
    for name, (codes, table) in _names(trace).items():
        columns[name] = arrow.DictionaryArray.from_arrays(codes.astype(np.int32), arrow.array(table, arrow.string()))
    file = io.BytesIO()
    parquet.write_table(arrow.table(columns).replace_schema_metadata({"memscope": json.dumps(dict(trace.meta))}), file)
    return file.getvalue()


def _names(trace: Trace) -> dict[str, tuple[Ints, tuple[str, ...]]]:
    """Column of names → the code of each allocation's name, and the names by code."""
    return {
        "category": (trace.category, CATEGORIES),
        "module": (trace.module, trace.modules),
        "op": (trace.op, trace.ops),
        "phase": (trace.phase, PHASES),
    }


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            "Parquet needs pyarrow, which is not installed: pip install pyarrow, or export with --to csv"
        ) from None
