"""The table of allocations: its columns, its file format, and queries. Imports only NumPy and msgspec."""

from memscope.trace.columns import (
    CATEGORIES,
    KEYS,
    MARK_COLUMNS,
    PHASES,
    Bools,
    Category,
    Ints,
    Key,
    Phase,
    columns_of,
)
from memscope.trace.file import SCHEMA_VERSION, read_json, read_whole, write_whole
from memscope.trace.meta import damage_of_texts
from memscope.trace.progress import Progress, no_progress
from memscope.trace.schema import Count, Seconds, SizeBytes, mismatch
from memscope.trace.table import Peak, Trace, damage_of, show_traces_with

__all__ = [
    "CATEGORIES", "KEYS", "MARK_COLUMNS", "PHASES", "SCHEMA_VERSION", "Bools", "Category", "Count", "Ints", "Key",
    "Peak", "Phase", "Progress", "Seconds", "SizeBytes", "Trace", "columns_of", "damage_of", "damage_of_texts",
    "mismatch", "no_progress", "read_json", "read_whole", "show_traces_with", "write_whole",
]  # fmt: skip
