"""The allocations that a tracker has seen, and the phases of the run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from memscope.hooks.work import WorkDone
from memscope.trace import CATEGORIES

__all__ = ["UNKNOWN", "Allocations", "Birth"]

UNKNOWN = -1
"""Category of an allocation whose purpose is not known yet."""
_TEMPORARY, _OTHER, _ACTIVATION = (CATEGORIES.index(name) for name in ("temporary", "other", "activation"))


class Birth(NamedTuple):
    """An allocation at its birth; module, op and phase are indices."""

    size_bytes: int
    module: int
    op: int
    phase: int
    step: int
    micro_batch: int
    born: int


@dataclass
class Allocations:
    """All allocations seen, in order of birth; `category` and `freed` are filled in later."""

    births: list[Birth] = field(default_factory=list)
    category: list[int] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    marks: list[tuple[int, int, int, int]] = field(default_factory=list)
    """`(event, phase, step, micro_batch)` for each change of phase, step or micro-batch."""
    work: WorkDone = field(default_factory=WorkDone)
    clock: int = 0
    """Number of the next event."""
    pending: list[int] = field(default_factory=list)
    """Allocations that autograd may keep for a backward pass that has not reached them yet."""
    on_category: Callable[[int], None] | None = None
    """Called with a live allocation when its category is known, or changes."""
    host: Allocations | None = None
    """The allocations on the host, where they are followed; phases begin there, too."""

    def mark(self, phase: int, step: int, micro_batch: int) -> None:
        """Begin a phase at the next event."""
        if self.host is not None:
            self.host.mark(phase, step, micro_batch)
        mark = (self.clock, phase, step, micro_batch)
        if self.marks and self.marks[-1][0] == self.clock:
            self.marks[-1] = mark
        elif not self.marks or self.marks[-1][1:] != mark[1:]:
            self.marks.append(mark)

    def free(self, index: int) -> None:
        """Free an allocation, unless it is free already."""
        if self.freed[index] < 0:
            self.freed[index] = self.clock
            self.clock += 1

    def keep_pending(self) -> None:
        """Categorize as activation the pending allocations that are alive: a backward pass continues."""
        if self.host is not None:
            self.host.keep_pending()
        for index in self.pending:
            if self.freed[index] < 0 and self.category[index] == UNKNOWN:
                self.category[index] = _ACTIVATION
                if self.on_category is not None:
                    self.on_category(index)
        self.pending.clear()

    def settle(self, *, never_freed_in: int | None) -> None:
        """Categorize the remaining allocations: `temporary` if freed within their step, else `other`.

        Allocations that were never freed count as freed in step `never_freed_in`; None: in no step.
        """
        if self.host is not None:
            self.host.settle(never_freed_in=never_freed_in)
        begins = [mark[0] for mark in self.marks]
        for index, category in enumerate(self.category):
            if category == UNKNOWN:
                self.category[index] = self._left_over(index, begins, never_freed_in)

    def settled(self, indices: Iterable[int]) -> list[int]:
        """The categories that allocations have, or will have after `settle`; `UNKNOWN` if that is not decided yet."""
        begins = [mark[0] for mark in self.marks]
        return [
            self._left_over(index, begins, None)
            if self.category[index] == UNKNOWN and self.freed[index] >= 0
            else self.category[index]
            for index in indices
        ]

    def _left_over(self, index: int, begins: Sequence[int], never_freed_in: int | None) -> int:
        freed = self.freed[index]
        died_in = self.marks[bisect_right(begins, freed) - 1][2] if freed >= 0 else never_freed_in
        return _TEMPORARY if died_in == self.births[index].step else _OTHER
