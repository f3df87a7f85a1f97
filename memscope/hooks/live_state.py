"""The live state of a run: its memory, its position, and a forecast of its peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from memscope.trace import Category, Phase

__all__ = ["Forecast", "LiveState", "MemoryKind", "Tell"]

MemoryKind: TypeAlias = Category | Literal["undecided", "unseen"]
"""A category, or memory without one. `undecided`: whether the backward pass needs it is not known yet. `unseen`: on a
GPU, bytes that the allocator allocated beyond the tensors, for rounding to blocks and for kernel workspaces."""

Forecast = Literal["so far", "estimate", "seen"]
"""The basis of the forecast of the peak. `so far`: none; the forecast is the peak so far. `estimate`: the first step,
plus the optimizer state that its end created. `seen`: a whole step that began with that state; later steps repeat it.
"""


@dataclass(frozen=True)
class LiveState:
    """A run at the beginning of a phase, or at its end."""

    memory: Mapping[MemoryKind, int]
    """Bytes allocated now, by kind; kinds with zero bytes are left out."""
    peak_bytes: int
    """Peak allocated bytes so far, including between reports."""
    forecast: Forecast
    forecast_bytes: int
    """Forecast peak of the whole run, on the basis `forecast`; never less than `peak_bytes`."""
    step: int
    """Index of the step, from 0, as in the trace."""
    phase: Phase
    micro_batch: int
    """Index of the micro-batch within the step, from 0."""
    done: int
    """Number of micro-batches done, over all steps."""
    total: int
    """Number of micro-batches of all steps."""
    micro_batches: int
    """Number of micro-batches of this step."""
    capacity_bytes: int | None = None
    """Bytes that PyTorch may reserve on the device; None: no limit is known."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated now, of all kinds."""
        return sum(self.memory.values())

    @property
    def is_finished(self) -> bool:
        """Whether every step is done."""
        return self.done == self.total


Tell = Callable[[LiveState], None]
"""A function that receives each new state of a run."""
