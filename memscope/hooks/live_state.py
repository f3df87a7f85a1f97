"""What a run tells while it goes: the memory it holds, where it is, and how far its peak can be foreseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from memscope.trace import Category, Phase

__all__ = ["Forecast", "LiveState", "MemoryKind", "Tell"]

MemoryKind: TypeAlias = Category | Literal["undecided", "unseen"]
"""A category, or what has none yet. `undecided`: made, and only what comes tells whether the backward pass needs it.
`unseen`: on a GPU, what the allocator gave out beyond the tensors: rounding to blocks, and memory inside kernels."""

Forecast = Literal["so far", "estimate", "seen"]
"""What the forecast of the peak rests on. `so far`: nothing, it is the largest so far. `estimate`: the first step, with
the optimizer state added that was made at its end. `seen`: a whole step that began with that state; the rest repeat it.
"""


@dataclass(frozen=True)
class LiveState:
    """A run at the beginning of a phase, or at its end."""

    memory: Mapping[MemoryKind, int]
    """Bytes held now; kinds without any are left out."""
    peak_bytes: int
    """Most that was held at any moment so far, between the states too."""
    forecast: Forecast
    forecast_bytes: int
    """The peak of the whole run, as far as `forecast` says; never less than `peak_bytes`."""
    step: int
    """From 0, as in the trace."""
    phase: Phase
    micro_batch: int
    """Within the step, from 0."""
    done: int
    """Micro-batches done, over all steps."""
    total: int
    """Micro-batches of all steps."""
    micro_batches: int
    """Micro-batches of this step."""
    capacity_bytes: int | None = None
    """Most that PyTorch may hold on the device; None: no limit is known."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes held now, of all kinds."""
        return sum(self.memory.values())

    @property
    def is_finished(self) -> bool:
        """Whether every step is done."""
        return self.done == self.total


Tell = Callable[[LiveState], None]
"""What is called with each new state of a run."""
