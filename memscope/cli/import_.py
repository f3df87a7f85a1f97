"""`memscope import`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.analysis.alive import occasion
from memscope.cli.next_command import print_next, report_words
from memscope.cli.tables import print_table
from memscope.command.options import FILE, argument, option, with_options
from memscope.command.output import errors_told_last, require_writable
from memscope.command.progress import shown_progress
from memscope.exchange.torch_reader import import_snapshot
from memscope.trace import CATEGORIES, Trace
from memscope.units import format_bytes, format_part

__all__ = ["command"]


@dataclass(frozen=True)
class ImportOptions:
    """The options of `memscope import`."""

    snapshot: Annotated[Path, argument(type=FILE)]
    device: Annotated[
        int | None,
        option("--device", type=click.IntRange(0), metavar="N", help="Number of the GPU, if the snapshot has several."),
    ]
    output: Annotated[
        Path | None,
        option("-o", "--output", type=FILE, metavar="FILE", help="Trace to write. Default: beside SNAPSHOT, as .npz."),
    ]
    force: Annotated[bool, option("-f", "--force", is_flag=True, help="Overwrite a file that exists.")]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document instead of a table.")]


@click.command("import")
@with_options(ImportOptions)
def command(options: ImportOptions) -> None:
    """Convert SNAPSHOT, written by torch.cuda.memory._dump_snapshot, into a trace.

    Nothing in the file is executed: a pickle with more than plain data is refused. Sizes and lifetimes are those that
    PyTorch's allocator recorded; the purpose of the memory is inferred from stacks, and marked as inferred.
    """
    snapshot = options.snapshot
    output = options.output or snapshot.with_suffix(".npz")
    require_writable(output, overwrite=options.force)
    with errors_told_last() as attempt:
        with shown_progress() as moved:
            trace = import_snapshot(snapshot, device=options.device, progress=moved)
            moved("writing the trace", 0, 1)
            is_saved = attempt(trace.save, output, overwrite=options.force)
        if options.as_json:
            click.echo(json.dumps(_document(trace, snapshot, output), ensure_ascii=False, indent=2))
            return
        console = Console(highlight=False)
        _print(console, trace, snapshot)
        if is_saved:
            print_next(console, report_words([output]))


def _document(trace: Trace, snapshot: Path, output: Path) -> dict[str, Any]:
    """The trace and its peak as one JSON value, sizes in bytes."""
    peak = trace.peak if trace.events else None
    return {
        "schema_version": 1,
        "snapshot": str(snapshot),
        "trace": str(output),
        "device": trace.meta["device"],
        "allocations": len(trace),
        "peak": {
            "allocated": peak.allocated_bytes,
            "reserved": trace.meta.get("peak_reserved"),
            "phase": peak.phase,
            "step": peak.step,
        }
        if peak
        else None,
        "at_peak": trace.by_category() if peak else None,
        "out_of_memory": trace.meta.get("out_of_memory"),
        "inferred": trace.meta.get("inferred", []),
        "notes": trace.meta.get("imported", {}).get("notes", []),
    }


def _print(console: Console, trace: Trace, snapshot: Path) -> None:
    device = trace.meta["device"]["name"]
    console.print(Text(f"{snapshot.name} on {device}: {len(trace):,} allocations", style="bold"))
    if trace.events:
        print_table(console, _at_peak(trace), "columns")
    oom = trace.meta.get("out_of_memory")
    if oom:
        reserved = format_part(oom["reserved"], oom["limit"])
        told = f"The run ran out of memory while allocating {format_bytes(oom['requested'])} ({reserved} reserved)."
        console.print(Text(told, style="bold red"))
    for note in trace.meta.get("imported", {}).get("notes", []):
        console.print(Text(f"Not exact: {note}.", style="yellow"))


def _at_peak(trace: Trace) -> Table:
    peak, inferred = trace.peak, bool(trace.meta.get("inferred"))
    table = Table(title="Allocated at the peak")
    table.add_column("inferred from stacks" if inferred else "")
    table.add_column("", justify="right")
    table.add_row("peak", Text(format_bytes(peak.allocated_bytes), style="bold"))
    table.add_row("at", occasion(peak.step, peak.phase).replace(" · ", ", "), end_section=True)
    sizes = trace.by_category()
    for category in CATEGORIES:
        if sizes[category]:
            table.add_row(category.replace("_", " "), format_bytes(sizes[category]))
    if trace.meta.get("peak_reserved"):
        table.add_section()
        table.add_row("peak reserved", format_bytes(trace.meta["peak_reserved"]))
    return table
