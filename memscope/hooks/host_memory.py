"""Memory of the host that a step on a GPU needs: copies of what was on the GPU, and what is computed from them."""

from __future__ import annotations

import numpy as np

from memscope.allocator.pinned import PinnedMemory
from memscope.hooks.allocations import UNKNOWN, Allocations, Birth
from memscope.hooks.position import Position
from memscope.trace import MARK_COLUMNS, Trace, columns_of

__all__ = ["HostMemory"]


class HostMemory:
    """The allocations on the host, with events of their own.

    Attributes:
        seen: the allocations so far; their sizes are those of the tensors.
        tensors: number of those that are alive.
    """

    def __init__(self, position: Position) -> None:
        self.seen, self.tensors = Allocations(), 0
        self._position, self._pinned = position, PinnedMemory()
        self._blocks: dict[int, int] = {}
        """Bytes of the pinned blocks that are in use, by allocation."""
        self._sizes: list[int] = []
        self._reserved: list[int] = []
        self._pageable_bytes = 0

    def enter(self, size_bytes: int, op: int, category: int, *, pinned: bool) -> int:
        """Record an allocation; returns its index."""
        seen, here = self.seen, self._position
        index = len(seen.births)
        seen.births.append(Birth(size_bytes, here.module, op, here.phase, here.step, here.micro_batch, seen.clock))
        seen.category.append(category)
        seen.freed.append(-1)
        seen.clock += 1
        if category == UNKNOWN and here.serves_backward:
            seen.pending.append(index)
        if pinned:
            self._blocks[index] = self._pinned.allocate(size_bytes)
        else:
            self._pageable_bytes += size_bytes
        self._sizes.append(self._blocks.get(index, size_bytes))
        self._event(1)
        return index

    def free(self, index: int) -> None:
        """Free an allocation."""
        self.seen.free(index)
        if index in self._blocks:
            self._pinned.free(self._blocks.pop(index))
        else:
            self._pageable_bytes -= self._sizes[index]
        self._event(-1)

    def own(self, index: int, category: int, module: int | None) -> None:
        """Set the category and module of an allocation; without a module, it keeps its own."""
        self.seen.category[index] = category
        if module is not None:
            self.seen.births[index] = self.seen.births[index]._replace(module=module)

    def _event(self, change: int) -> None:
        self.tensors += change
        self._reserved.append(self._pinned.reserved_bytes + self._pageable_bytes)

    def trace(self, modules: tuple[str, ...], ops: tuple[str, ...]) -> Trace:
        """The allocations as a trace, whose sizes are those of the blocks."""
        seen = self.seen
        births = columns_of(("requested", "module", "op", "phase", "step", "micro_batch", "born"), seen.births)
        return Trace(
            **births,
            size=np.array(self._sizes, dtype=np.int64),
            category=np.array(seen.category, dtype=np.int64),
            freed=np.array(seen.freed, dtype=np.int64),
            **columns_of(MARK_COLUMNS, seen.marks),
            reserved=np.array(self._reserved, dtype=np.int64),
            modules=modules,
            ops=ops,
            meta={},
        )
