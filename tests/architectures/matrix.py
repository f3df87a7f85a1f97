"""All rows of the matrix, and the comparison of a simulation with a recorded run."""

from __future__ import annotations

from architectures.plain import PLAIN
from architectures.text import ENCODERS, EXPERTS, PAIRS, STATES, TEXT
from architectures.vision import MULTIMODAL, SPEECH, VISION
from memscope.trace import CATEGORIES, PHASES, Trace

__all__ = ["ROWS", "allocations"]

ROWS = {row.name: row for row in (*TEXT, *EXPERTS, *STATES, *ENCODERS, *PAIRS, *VISION, *MULTIMODAL, *SPEECH, *PLAIN)}
"""Name → architecture."""


def allocations(trace: Trace) -> list[tuple[str, int, str, str, str]]:
    """Operator, size, category, phase and module of each allocation, in order."""
    ops = ["brought" if name in ("aten.clone.default", "aten.empty_strided.default") else name for name in trace.ops]
    columns = zip(trace.op, trace.requested.tolist(), trace.category, trace.phase, trace.module, strict=True)
    return [
        (ops[op], size, CATEGORIES[category], PHASES[phase], trace.modules[module])
        for op, size, category, phase, module in columns
    ]
