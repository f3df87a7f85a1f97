"""The peak of the memory that a step on a GPU needs on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from memscope.trace import Category, Phase, Trace
from memscope.units import format_bytes

__all__ = ["HostPeak", "about_host", "host_bytes", "host_peak"]


@dataclass(frozen=True)
class HostPeak:
    """The moment with the most memory on the host; the first of several equal ones."""

    allocated_bytes: int
    """Blocks of pinned memory, which are powers of two, and pageable copies."""
    requested_bytes: int
    """The tensors in them."""
    reserved_bytes: int
    """Most bytes taken from the system in the run: PyTorch keeps pinned blocks that are free for later tensors."""
    by_category: Mapping[Category, int]
    """Of `allocated_bytes`, by category; those without any are left out."""
    phase: Phase
    step: int

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "allocated": self.allocated_bytes,
            "requested": self.requested_bytes,
            "reserved": self.reserved_bytes,
            "by_category": dict(self.by_category),
            "phase": self.phase,
            "step": self.step,
        }


def host_peak(trace: Trace) -> HostPeak | None:
    """The peak on the host; None where nothing was there, or a run in which that is not followed."""
    host = trace.host
    if host is None or not host.events:
        return None
    peak = host.peak
    return HostPeak(
        allocated_bytes=peak.allocated_bytes,
        requested_bytes=int(host.requested[host.at(peak.event)].sum()),
        reserved_bytes=int(host.reserved.max()),
        by_category=host.by("category"),
        phase=peak.phase,
        step=peak.step,
    )


def host_bytes(trace: Trace, step: int) -> int:
    """Most bytes on the host during a step; what is there when the step begins counts, too."""
    host = trace.host
    if host is None or not host.events:
        return 0
    first, last = (
        int(np.append(host.mark_event, host.events)[np.searchsorted(host.mark_step, step, side=side)])
        for side in ("left", "right")
    )
    return int(host.allocated[max(first - 1, 0) : last].max(initial=0))


def about_host(peak: HostPeak) -> str:
    """A peak in words."""
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in peak.by_category.items())
    taken = f"; {format_bytes(peak.reserved_bytes)} taken from the system"
    return (
        f"{format_bytes(peak.allocated_bytes)} ({parts}){taken if peak.reserved_bytes > peak.allocated_bytes else ''}"
    )
