"""Number every event on the host, to find the operator behind each entry of the allocator's history.

If PyTorch supports it, the number of the running operator is attached to each entry of the history (per-thread
allocation metadata: `user_metadata` in c10/cuda/CUDACachingAllocator.cpp, in PyTorch 2.11 and 2.13). Otherwise entries
are matched by the times at which each operator began and ended.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

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
        self._began: list[int] = []
        self._ended: list[int] = []

    def annotate_with(self, annotate: Callable[[str], None] | None) -> None:
        """Attach numbers to allocations with this function from now on; None: record Unix times in nanoseconds."""
        self._annotate = annotate

    def begin(self, op: int, module: int, phase: int, step: int, micro_batch: int) -> None:
        """Note that an operator begins."""
        self.rows.append(Moment(op, module, phase, step, micro_batch))
        self._began.append(self._clock() if self._annotate is None else 0)
        self._ended.append(0)
        if self._annotate is not None:
            self._annotate(str(len(self.rows) - 1))

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
        text = entry.get("user_metadata") or ""
        return int(text) if text.isdigit() and int(text) < len(self.rows) else -1

    def _by_time(self, entry: Mapping[str, Any]) -> int:
        number = self._begun_by(entry)
        ended = self._ended[number] if number >= 0 else 0
        return -1 if ended and entry["time_us"] * 1000 > ended else number

    def _begun_by(self, entry: Mapping[str, Any]) -> int:
        last_nanosecond = entry["time_us"] * 1000 + 999
        return bisect_right(self._began, last_nanosecond) - 1


def _column(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)
