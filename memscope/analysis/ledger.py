"""The ledger: reconciles the figures that different tools show for one run.

requested → allocated (whole blocks) → reserved (segments, including cached and unusable memory) → CUDA context and
libraries → the driver's count, with an explicit unexplained row; other processes are listed separately.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from memscope.analysis.summary import notebook_html
from memscope.trace import Trace
from memscope.units import format_bytes, format_change

__all__ = ["Ledger", "Line", "ledger"]


@dataclass(frozen=True)
class Line:
    """One line: `added` bytes lead from the total of the line above to this `total`."""

    name: str
    added: int
    total: int
    seen_in: str
    """The tool that shows the total."""
    estimate: bool = False


@dataclass(frozen=True)
class Ledger:
    """The figures of one run, from the bytes requested at the peak to the memory the device reports."""

    lines: tuple[Line, ...]
    note: str = ""
    """Why lines are missing, as a sentence; empty if none is."""

    def __getitem__(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)

    def __rich__(self) -> Table:
        table = Table(title="Ledger", title_justify="left")
        for heading in ("", "added", "total", "seen in"):
            table.add_column(heading, justify="right" if heading in ("added", "total") else "left")
        for line in self.lines:
            name = f"{line.name} (estimate)" if line.estimate else line.name
            table.add_row(name, format_change(line.added), format_bytes(line.total), Text(line.seen_in))
        table.caption = Text(self.note) if self.note else None
        return table

    def _repr_html_(self) -> str:
        return notebook_html(self.__rich__())

    def total(self, name: str) -> int | None:
        """The total of a line; None if the ledger has no such line."""
        return next((line.total for line in self.lines if line.name == name), None)


def ledger(trace: Trace) -> Ledger | None:
    """The ledger of a trace's peak; None for a run without a caching allocator (on the CPU).

    Requested and allocated bytes are those at the allocated peak; reserved is the peak of the whole run, as shown by
    `torch.cuda.max_memory_reserved`. In a measured run, `context` is the memory that the driver counted beyond reserved
    memory before the first step, and `unexplained` is its growth until the end of the last step: kernels loaded on
    first use, and memory that libraries took outside PyTorch's allocator.
    """
    if not trace.reserved.size:
        return None
    peak = trace.peak
    alive = trace.at(peak.event)
    requested = int(trace.requested[alive].sum())
    allocated, reserved = peak.allocated_bytes, int(trace.meta["peak_reserved"])
    lines = [
        Line("requested", requested, requested, "the sizes of the tensors"),
        Line("allocated", allocated - requested, allocated, "torch.cuda.max_memory_allocated"),
        Line("reserved", reserved - allocated, reserved, "torch.cuda.max_memory_reserved"),
    ]
    if "driver" in trace.meta:
        seen, note = _seen_by_driver(trace, reserved)
        return Ledger((*lines, *seen), note)
    context = int(trace.meta.get("context", 0))
    if not context:  # `gpu` is not a specific device
        return Ledger(tuple(lines), "the driver's memory beyond reserved memory is not known for this device")
    lines.append(Line("device", context, reserved + context, "nvidia-smi, of this process", estimate=True))
    return Ledger(tuple(lines))


def _seen_by_driver(trace: Trace, reserved: int) -> tuple[list[Line], str]:
    """The lines from reserved memory to the driver's count, and why lines are missing."""
    before, after = trace.meta["driver"]["before"], trace.meta["driver"]["after"]
    alone = before["process_bytes"] is not None and after["process_bytes"] is not None
    kind, whose = ("process_bytes", "of this process") if alone else ("used_bytes", "of all processes together")
    if before[kind] is None or after[kind] is None:
        return [], f"the driver's count is not known: {after['reason'] or before['reason']}"
    context = before[kind] - trace.meta["reserved_before"]
    unexplained = after[kind] - trace.meta["reserved_at_end"] - context
    device = reserved + context + unexplained
    lines = [
        Line("context", context, reserved + context, f"nvidia-smi before the first step, {whose}, beyond reserved"),
        Line("unexplained", unexplained, device, "the remainder"),
        Line("device", 0, device, f"nvidia-smi, {whose}"),
    ]
    if not alone:
        return lines, f"this process cannot be distinguished from others: {after['reason'] or before['reason']}"
    others = after["others_bytes"]
    return [*lines, Line("others", others, device + others, "nvidia-smi, all processes")], ""
