"""The memory that a recorder has seen, while the run goes on: what is held now, and what was held at the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memscope.hooks.allocations import UNKNOWN, Allocations
from memscope.hooks.live_state import MemoryKind
from memscope.trace import CATEGORIES

__all__ = ["Held", "HeldMemory"]


@dataclass(frozen=True)
class Held:
    """Bytes of each kind; kinds with zero bytes are left out."""

    now: dict[MemoryKind, int]
    at_peak: dict[MemoryKind, int]
    """At the peak since the previous look; the moment of that look counts."""


class HeldMemory:
    """Looks at the allocations of a run.

    Each look visits only the allocations that were alive at the previous look, and those made since.
    """

    def __init__(self, seen: Allocations) -> None:
        self._seen = seen
        self._alive: list[int] = []
        self._next_birth = self._clock = 0
        self._held_bytes = 0

    def look(self) -> Held:
        """The memory now, and at the peak since the previous look."""
        seen, begin = self._seen, self._clock
        known = [*self._alive, *range(self._next_birth, len(seen.births))]
        change = np.zeros(seen.clock - begin + 1, dtype=np.int64)  # the first place is the previous look
        change[0] = self._held_bytes
        for index in known:
            birth, freed = seen.births[index], seen.freed[index]
            if index >= self._next_birth:
                change[birth.born - begin + 1] += birth.size_bytes
            if freed >= 0:
                change[freed - begin + 1] -= birth.size_bytes
        peak = begin - 1 + int(np.argmax(np.cumsum(change)))
        at_peak = self._by_kind(
            [index for index in known if seen.births[index].born <= peak and not 0 <= seen.freed[index] <= peak]
        )
        self._alive = [index for index in known if seen.freed[index] < 0]
        now = self._by_kind(self._alive)
        self._next_birth, self._clock, self._held_bytes = len(seen.births), seen.clock, sum(now.values())
        return Held(now, at_peak)

    def _by_kind(self, allocations: Sequence[int]) -> dict[MemoryKind, int]:
        sizes: dict[MemoryKind, int] = {}
        for index, category in zip(allocations, self._seen.settled(allocations), strict=True):
            kind: MemoryKind = "undecided" if category == UNKNOWN else CATEGORIES[category]
            sizes[kind] = sizes.get(kind, 0) + self._seen.births[index].size_bytes
        return sizes
