"""A running number for everything that happens on the host, so that the allocator's history can be told what it was.

Where PyTorch has it, the number of the operator at work is attached to each entry of the history (per-allocation
metadata, a thread's own: `user_metadata` in c10/cuda/CUDACachingAllocator.cpp, in PyTorch 2.11 and 2.13); elsewhere the
time at which each number began and ended tells.
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
    """What the host did: ran an operator (`op` indexes the tracker's names), or began a phase (`op` is 0)."""

    op: int
    module: int
    phase: int
    step: int
    micro_batch: int


class Sighting(NamedTuple):
    """Where a storage was first seen."""

    moment: int
    address: int


class Moments:
    """Numbers what a tracker sees.

    Attributes:
        rows: what each number stands for.
        marks: the numbers that began a phase.
        sightings: of each allocation the tracker has seen, in its order.
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
        """Attach numbers to allocations with this function from now on; None: keep times (Unix, in nanoseconds)."""
        self._annotate = annotate

    def begin(self, op: int, module: int, phase: int, step: int, micro_batch: int) -> None:
        """An operator begins."""
        self.rows.append(Moment(op, module, phase, step, micro_batch))
        self._began.append(self._clock() if self._annotate is None else 0)
        self._ended.append(0)
        if self._annotate is not None:
            self._annotate(str(len(self.rows) - 1))

    def end(self) -> None:
        """The operator that began last has ended."""
        if self._annotate is not None:
            self._annotate("")
        else:
            self._ended[-1] = self._clock()

    def mark(self, module: int, phase: int, step: int, micro_batch: int) -> None:
        """A phase begins."""
        self.marks.append(len(self.rows))
        self.begin(0, module, phase, step, micro_batch)

    def born(self, address: int) -> None:
        """A storage was seen for the first time."""
        self.sightings.append(Sighting(len(self.rows) - 1, address))

    def of_entries(self, entries: Sequence[Mapping[str, Any]]) -> tuple[Ints, Ints]:
        """For each entry of a history: the number of the operator it was made in, and the last number that had begun.

        The first is -1 outside any operator. The second never decreases: int64 `[entries]`, both.
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
