"""The ledger: how the numbers that different tools show for one run follow from each other.

requested → allocated (whole blocks) → reserved (segments; what is not allocated of them is cached or unusable) →
context and libraries → what the driver reports, with a row for what nobody explains.
"""

from __future__ import annotations

from dataclasses import dataclass

from memscope.trace import Trace

__all__ = ["Ledger", "Line", "ledger"]


@dataclass(frozen=True)
class Line:
    """One step of the way: `added` bytes lead from the line above to `total`."""

    name: str
    added: int
    total: int
    seen_in: str
    """The tool that shows the total."""
    estimate: bool = False


@dataclass(frozen=True)
class Ledger:
    """From what was asked for at the peak to what the device shows."""

    lines: tuple[Line, ...]

    def __getitem__(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)


def ledger(trace: Trace) -> Ledger | None:
    """The ledger of a trace's peak; None where there is no allocator to account for (a run on the CPU).

    Requested and allocated are those of the moment with the most allocated memory; reserved is the most of the whole
    run, as `torch.cuda.max_memory_reserved` shows it.
    """
    if not trace.reserved.size:
        return None
    peak = trace.peak
    alive = trace.at(peak.event)
    requested = int(trace.requested[alive].sum())
    allocated, reserved = peak.allocated_bytes, int(trace.meta["peak_reserved"])
    context = int(trace.meta["context"])
    lines = [
        Line("requested", requested, requested, "sizes of tensors"),
        Line("allocated", allocated - requested, allocated, "max_memory_allocated"),
        Line("reserved", reserved - allocated, reserved, "max_memory_reserved"),
        Line("device", context, reserved + context, "nvidia-smi", estimate=True),
    ]
    return Ledger(tuple(lines))
