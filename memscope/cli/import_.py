"""`memscope import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.cli.progress import shown_progress
from memscope.errors import UsageError
from memscope.exchange.torch_reader import import_snapshot
from memscope.trace import CATEGORIES, Trace
from memscope.units import format_bytes

__all__ = ["command"]


@click.command("import")
@click.argument("snapshot", type=click.Path(path_type=Path))
@click.option("--device", type=click.IntRange(0), metavar="N", help="Which GPU, where the snapshot holds several.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the trace goes. Default: beside SNAPSHOT, with .npz at the end.",
)
@click.option("-f", "--force", is_flag=True, help="Overwrite a file that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(snapshot: Path, device: int | None, output: Path | None, force: bool, as_json: bool, debug: bool) -> None:
    """Turn SNAPSHOT, written by torch.cuda.memory._dump_snapshot, into a trace.

    Nothing in the file is executed: a pickle that holds more than plain data is refused. Sizes and lifetimes are those
    that PyTorch's allocator noted; what the memory was for is inferred from the stacks, and marked so.
    """
    output = output or snapshot.with_suffix(".npz")
    if output.exists() and not force:
        raise UsageError(f"{output} exists already: choose another name with -o, or overwrite it with -f")
    with shown_progress() as progress:
        trace = import_snapshot(snapshot, device=device, progress=progress)
        progress("writing the trace", 0, 1)
        trace.save(output, overwrite=force)
    if as_json:
        click.echo(json.dumps(_document(trace, snapshot, output), ensure_ascii=False, indent=2))
    else:
        _print(Console(highlight=False), trace, snapshot, output)


def _document(trace: Trace, snapshot: Path, output: Path) -> dict[str, Any]:
    """What was found as one JSON value, sizes in bytes."""
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


def _print(console: Console, trace: Trace, snapshot: Path, output: Path) -> None:
    device = trace.meta["device"]["name"]
    console.print(Text(f"{snapshot.name} on {device}: {len(trace):,} allocations", style="bold"))
    if trace.events:
        console.print(_at_peak(trace))
    oom = trace.meta.get("out_of_memory")
    if oom:
        asked, reserved = format_bytes(oom["requested"]), format_bytes(oom["reserved"])
        told = f"It ran out of memory, asking {asked} with {reserved} of {format_bytes(oom['limit'])} taken."
        console.print(Text(told, style="bold red"))
    for note in trace.meta.get("imported", {}).get("notes", []):
        console.print(Text(f"Not exact: {note}.", style="yellow"))
    console.print(Text(f"Next: memscope report {output}"), soft_wrap=True)


def _at_peak(trace: Trace) -> Table:
    peak, inferred = trace.peak, "inferred" in trace.meta
    table = Table(title="Allocated at the peak")
    table.add_column("inferred from stacks" if inferred else "")
    table.add_column("", justify="right")
    table.add_row("peak", Text(format_bytes(peak.allocated_bytes), style="bold"))
    table.add_row("at", f"step {peak.step}, {peak.phase}", end_section=True)
    sizes = trace.by_category()
    for category in CATEGORIES:
        if sizes[category]:
            table.add_row(category.replace("_", " "), format_bytes(sizes[category]))
    if trace.meta.get("peak_reserved"):
        table.add_section()
        table.add_row("reserved, at most", format_bytes(trace.meta["peak_reserved"]))
    return table
