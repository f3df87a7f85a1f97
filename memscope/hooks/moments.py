"""Number every event on the host, to find the operator behind each entry of the allocator's history.

If PyTorch supports it, a label with the number of the running operator is attached to each entry of the history
(per-thread allocation metadata: `user_metadata` in c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.11 and later).
Otherwise entries are matched by the times at which each operator began and ended. Where PyTorch can annotate a block
that exists (`annotateMemory` in the same file, PyTorch 2.15), each gets a label when its category is known.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from memscope.hooks.labels import names_label, number_of, operator_label, owner_label
from memscope.trace import Ints

__all__ = ["Moment", "Moments", "Sighting"]


class Moment(NamedTuple):
    """One event on the host: an operator ran (`op` indexes the tracker's names), or a phase began (`op` is 0)."""

    op: int
    module: int
    phase: int
    step: int
    micro_batch: int


class Sighting(NamedTuple):
    """The moment and the address at which a storage was first seen."""

    moment: int
    address: int


class Moments:
    """Numbers the operators and phases that a tracker sees.

    Attributes:
        rows: the moment of each number.
        marks: the numbers of moments that began a phase.
        sightings: one per allocation that the tracker has seen, in its order.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self.rows: list[Moment] = []
        self.marks: list[int] = []
        self.sightings: list[Sighting] = []
        self._clock = clock
        self._annotate: Callable[[str], None] | None = None
        self._annotate_block: Callable[[int, str], None] | None = None
        self._ops: Sequence[str] = ()
        self._modules: Sequence[str] = ()
        self._names: dict[tuple[int, int], str] = {}
        self._began: list[int] = []
        self._ended: list[int] = []

    def name_with(self, ops: Sequence[str], modules: Sequence[str]) -> None:
        """Name operators and modules in labels from these tables, which may grow."""
        self._ops, self._modules = ops, modules

    def annotate_with(
        self, annotate: Callable[[str], None] | None, annotate_block: Callable[[int, str], None] | None = None
    ) -> None:
        """Attach labels from now on: with `annotate` to the allocations that follow, with the other to a live block.

        Without `annotate`, Unix times in nanoseconds are recorded.
        """
        self._annotate, self._annotate_block = annotate, annotate_block

    def begin(self, op: int, module: int, phase: int, step: int, micro_batch: int) -> None:
        """Note that an operator begins."""
        self.rows.append(Moment(op, module, phase, step, micro_batch))
        self._began.append(self._clock() if self._annotate is None else 0)
        self._ended.append(0)
        if self._annotate is not None:
            names = self._names.get((op, module))
            if names is None:
                names = self._names[op, module] = names_label(self._ops[op], self._modules[module])
            self._annotate(operator_label(len(self.rows) - 1, phase, step, micro_batch, names))

    def end(self) -> None:
        """Note that the operator that began last has ended."""
        if self._annotate is not None:
            self._annotate("")
        else:
            self._ended[-1] = self._clock()

    def mark(self, module: int, phase: int, step: int, micro_batch: int) -> None:
        """Note that a phase begins."""
        self.marks.append(len(self.rows))
        self.begin(0, module, phase, step, micro_batch)

    def born(self, address: int) -> None:
        """Note that a storage was seen for the first time."""
        self.sightings.append(Sighting(len(self.rows) - 1, address))

    def owned(self, storage: int, category: int, module: int) -> None:
        """Note what a live storage is for; `storage` counts the sightings."""
        if self._annotate_block is not None:
            self._annotate_block(self.sightings[storage].address, owner_label(category, self._modules[module]))

    def of_entries(self, entries: Sequence[Mapping[str, Any]]) -> tuple[Ints, Ints]:
        """For each entry of a history: the number of its operator, and the last number that had begun.

        Both are int64 `[entries]`. The first is -1 outside any operator. The second never decreases.
        """
        annotated = self._annotate is not None
        numbers = _column([self._by_metadata(entry) if annotated else self._by_time(entry) for entry in entries])
        begun = numbers if annotated else _column([self._begun_by(entry) for entry in entries])
        is_op = _column([row.op for row in self.rows])[numbers] > 0
        return np.where((numbers >= 0) & is_op, numbers, -1), np.maximum.accumulate(np.maximum(begun, 0))

    def _by_metadata(self, entry: Mapping[str, Any]) -> int:
        number = number_of(entry.get("user_metadata") or "")
        return number if number < len(self.rows) else -1

    def _by_time(self, entry: Mapping[str, Any]) -> int:
        number = self._begun_by(entry)
        ended = self._ended[number] if number >= 0 else 0
        return -1 if ended and entry["time_us"] * 1000 > ended else number

    def _begun_by(self, entry: Mapping[str, Any]) -> int:
        last_nanosecond = entry["time_us"] * 1000 + 999
        return bisect_right(self._began, last_nanosecond) - 1


def _column(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)
