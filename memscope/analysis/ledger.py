"""The ledger: how the numbers that different tools show for one run follow from each other.

requested → allocated (whole blocks) → reserved (segments; what is not allocated of them is cached or unusable) →
context and libraries → what the driver reports, with a row for what nobody explains; other processes apart.
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
    note: str = ""
    """Why a line is missing, as a sentence."""

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
        """The total of a line; None where the ledger has no such line."""
        return next((line.total for line in self.lines if line.name == name), None)


def ledger(trace: Trace) -> Ledger | None:
    """The ledger of a trace's peak; None where there is no allocator to account for (a run on the CPU).

    Requested and allocated are those of the moment with the most allocated memory; reserved is the most of the whole
    run, as `torch.cuda.max_memory_reserved` shows it. In a measured run `context` is what the driver counted beyond
    reserved memory before the first step, and `unexplained` how much more that was after the last one: kernels loaded
    on first use, and what libraries took past PyTorch's allocator.
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
    context = int(trace.meta["context"])
    if not context:  # `gpu` is no certain device
        return Ledger(tuple(lines), "what the driver would count beyond reserved memory is not known of this device")
    lines.append(Line("device", context, reserved + context, "nvidia-smi, of this process", estimate=True))
    return Ledger(tuple(lines))


def _seen_by_driver(trace: Trace, reserved: int) -> tuple[list[Line], str]:
    """The lines from reserved memory to what the driver counted, and why there are none or fewer."""
    before, after = trace.meta["driver"]["before"], trace.meta["driver"]["after"]
    alone = before["process_bytes"] is not None and after["process_bytes"] is not None
    kind, whose = ("process_bytes", "of this process") if alone else ("used_bytes", "of all processes together")
    if before[kind] is None or after[kind] is None:
        return [], f"what the driver counts is not known: {after['reason'] or before['reason']}"
    context = before[kind] - trace.meta["reserved_before"]
    unexplained = after[kind] - trace.meta["reserved_at_end"] - context
    device = reserved + context + unexplained
    lines = [
        Line("context", context, reserved + context, f"nvidia-smi before the first step, {whose}, beyond reserved"),
        Line("unexplained", unexplained, device, "what is left"),
        Line("device", 0, device, f"nvidia-smi, {whose}"),
    ]
    if not alone:
        return lines, f"this process cannot be told from others: {after['reason'] or before['reason']}"
    others = after["others_bytes"]
    return [*lines, Line("others", others, device + others, "nvidia-smi, with other processes")], ""
