"""A trace and a ledger as a table: in a terminal through rich, in a notebook as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from memscope.inferred import marked
from memscope.units import format_bytes, format_change

if TYPE_CHECKING:
    from memscope.ledger import Ledger
    from memscope.trace import Trace

__all__ = ["ledger_table", "notebook_html", "trace_table"]

_BAR = 24
"""Characters of the longest bar."""


def trace_table(trace: Trace) -> Table:
    """The run, its peak, and the categories of memory at the peak."""
    meta = trace.meta
    table = Table(title=Text(f"{meta.get('target', 'a run')}: {len(trace):,} allocations"), title_justify="left")
    table.add_column(marked("at the peak", "category", trace))
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("share", justify="right")
    table.add_column("", no_wrap=True)
    table.caption = _about(trace)
    if not trace.events:
        return table
    total = trace.peak.allocated_bytes
    for category, size_bytes in trace.by_category().items():
        if size_bytes:
            share = size_bytes / total
            bar = "█" * round(_BAR * share) or "▏"
            table.add_row(category.replace("_", " "), format_bytes(size_bytes), f"{share:.1%}", bar)
    table.add_section()
    table.add_row("allocated", Text(format_bytes(total), style="bold"), "", "")
    return table


def _about(trace: Trace) -> Text:
    words = []
    if trace.events:
        peak = trace.peak
        phase = peak.phase.replace("_", " ")
        words.append(phase if peak.step < 0 else f"step {peak.step}, {phase}")
    match trace.meta.get("device"):
        case {"name": name, "simulated": bool(simulated)}:
            words.append(f"{name}, {'simulated' if simulated else 'measured'}")
    match trace.meta.get("strategies"):
        case [*strategies] if strategies:
            words.append(", ".join(map(str, strategies)))
    return Text("; ".join(words))


def ledger_table(ledger: Ledger) -> Table:
    """Each line of the ledger: the bytes it adds, the total, and the tool that shows the total."""
    table = Table(title="Ledger", title_justify="left")
    for heading in ("", "added", "total", "seen in"):
        table.add_column(heading, justify="right" if heading in ("added", "total") else "left")
    for line in ledger.lines:
        name = f"{line.name} (estimate)" if line.estimate else line.name
        table.add_row(name, format_change(line.added), format_bytes(line.total), Text(line.seen_in))
    table.caption = Text(ledger.note) if ledger.note else None
    return table


def notebook_html(table: Table) -> str:
    """A table as rich shows it in a notebook."""
    html: str = table._repr_mimebundle_([], [])["text/html"]
    return html
