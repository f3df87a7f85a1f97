"""The texts that a recorder attaches to the history of PyTorch's allocator, and that `memscope import` reads back.

A text is JSON on one line, which PyTorch's viewer shows as it is. One kind says which operator allocated (PyTorch 2.11
and later: `_set_memory_metadata`), the other what the memory of a block is for, once that is known (2.15:
`_annotate_tensor`):

    {"memscope":1,"number":17,"phase":"forward","step":0,"micro_batch":0,"op":"aten.mm.default","module":"layers.0.wq"}
    {"memscope":1,"category":"activation","module":"layers.0.wq"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from memscope.trace import CATEGORIES, PHASES

__all__ = ["names_label", "number_of", "operator_label", "owner_label", "read_label"]

_START = '{"memscope":1,'
_NUMBERED = f'{_START}"number":'
_LONGEST = 10_000
"""Characters of a label; a longer text is none."""
_MOST = 2**31


def names_label(op: str, module: str) -> str:
    """The part of an operator's label that is the same at each of its calls in a module."""
    return f'"op":{json.dumps(op)},"module":{json.dumps(module)}'


def operator_label(number: int, phase: int, step: int, micro_batch: int, names: str) -> str:
    """The label of an operator's call. `phase` indexes `PHASES`; `names` is made by `names_label`."""
    return f'{_NUMBERED}{number},"phase":"{PHASES[phase]}","step":{step},"micro_batch":{micro_batch},{names}}}'


def owner_label(category: int, module: str) -> str:
    """The label of a block whose category is known. `category` indexes `CATEGORIES`."""
    return f'{_START}"category":"{CATEGORIES[category]}","module":{json.dumps(module)}}}'


def number_of(text: str) -> int:
    """The number of the operator's call in a label of this process; -1: the text is none."""
    return int(text[len(_NUMBERED) : text.index(",", len(_NUMBERED))]) if text.startswith(_NUMBERED) else -1


def read_label(text: object) -> Mapping[str, Any]:
    """A label from a file: one with `category` or one with `op`, all values checked; empty if the text is none."""
    if not isinstance(text, str) or len(text) > _LONGEST or not text.startswith(_START):
        return {}
    try:
        label = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    match label:
        case {"category": category, "module": str()} if category in CATEGORIES:
            return dict(label)
        case {"op": str(), "module": str(), "phase": phase, "step": step, "micro_batch": micro_batch} if (
            phase in PHASES
            and type(step) is type(micro_batch) is int
            and -1 <= step < _MOST
            and 0 <= micro_batch < _MOST
        ):
            return dict(label)
    return {}
