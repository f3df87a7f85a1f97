"""A trace as a table: in a terminal through rich, in a notebook as HTML."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from memscope.analysis.chosen import strategies_of
from memscope.analysis.inferred import marked
from memscope.analysis.notes import told_notes
from memscope.trace import Trace, show_traces_with
from memscope.units import format_bytes

__all__ = ["notebook_html", "trace_table"]

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
    """Where the peak is, the device and the strategies; then the notes, one a line."""
    words = []
    if trace.events:
        peak = trace.peak
        phase = peak.phase.replace("_", " ")
        words.append(phase if peak.step < 0 else f"step {peak.step}, {phase}")
    match trace.meta.get("device"):
        case {"name": name, "simulated": bool(simulated)}:
            words.append(f"{name}, {'simulated' if simulated else 'measured'}")
    if strategies := strategies_of(trace):
        words.append(", ".join(strategies))
    return Text("\n".join(["; ".join(words), *told_notes(trace)]).strip())


def notebook_html(table: Table) -> str:
    """A table as rich shows it in a notebook."""
    html: str = table._repr_mimebundle_([], [])["text/html"]
    return html


show_traces_with(rich=trace_table, html=lambda trace: notebook_html(trace_table(trace)))
