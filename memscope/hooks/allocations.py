"""What a tracker has seen: every allocation, and where the run was meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from memscope.hooks.work import WorkDone
from memscope.trace import CATEGORIES

__all__ = ["UNKNOWN", "Allocations", "Birth"]

UNKNOWN = -1
"""The category of an allocation of which nothing is known yet."""
_TEMPORARY, _OTHER = CATEGORIES.index("temporary"), CATEGORIES.index("other")


class Birth(NamedTuple):
    """An allocation when it was made; names are given as indices."""

    size_bytes: int
    module: int
    op: int
    phase: int
    step: int
    micro_batch: int
    born: int


@dataclass
class Allocations:
    """What was seen, in order of birth; `category` and `freed` are filled in later than the rest."""

    births: list[Birth] = field(default_factory=list)
    category: list[int] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    marks: list[tuple[int, int, int, int]] = field(default_factory=list)
    """`(event, phase, step, micro_batch)` whenever one of the last three changes."""
    work: WorkDone = field(default_factory=WorkDone)

    def settle(self, *, never_freed_in: int | None) -> None:
        """Name the rest: temporary if freed within its step, else `other`.

        What was never freed counts as freed in step `never_freed_in`; None: in no step.
        """
        ends = np.array([mark[0] for mark in self.marks])
        steps = [mark[2] for mark in self.marks]
        for index, category in enumerate(self.category):
            if category != UNKNOWN:
                continue
            freed = self.freed[index]
            died_in = steps[int(np.searchsorted(ends, freed, side="right")) - 1] if freed >= 0 else never_freed_in
            self.category[index] = _TEMPORARY if died_in == self.births[index].step else _OTHER
