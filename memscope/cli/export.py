"""`memscope export`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
from rich.console import Console
from rich.text import Text

from memscope.cli.next_command import print_next, report_words
from memscope.cli.trace_files import refuse_pickle
from memscope.command.options import FILE, argument, option, with_options
from memscope.command.output import require_writable
from memscope.command.progress import shown_progress
from memscope.exchange.chrome_trace import MOST_SLICES, chrome_trace_bytes
from memscope.exchange.tables import csv_bytes, parquet_bytes
from memscope.exchange.torch_writer import torch_snapshot_bytes
from memscope.trace import Trace, write_whole
from memscope.units import format_bytes

__all__ = ["command"]


@dataclass(frozen=True)
class _Format:
    suffix: str
    write: Callable[[Trace, Callable[[str, int, int], None]], bytes]
    opens_in: str
    """Where people open the file."""


_FORMATS = {
    "torch-snapshot": _Format(".pickle", torch_snapshot_bytes, "https://pytorch.org/memory_viz"),
    "perfetto": _Format(".trace.json", chrome_trace_bytes, "https://ui.perfetto.dev"),
    "chrome": _Format(".trace.json", chrome_trace_bytes, "chrome://tracing"),
    "csv": _Format(".csv", csv_bytes, "a spreadsheet, or pandas.read_csv"),
    "parquet": _Format(".parquet", parquet_bytes, "pandas.read_parquet, polars, DuckDB"),
}


@dataclass(frozen=True)
class ExportOptions:
    """The options of `memscope export`."""

    file: Annotated[Path, argument(type=FILE)]
    to: Annotated[str, option("--to", required=True, type=click.Choice(list(_FORMATS)), help="Format of the output.")]
    output: Annotated[
        Path | None,
        option(
            "-o",
            "--output",
            type=FILE,
            metavar="FILE",
            help="File to write. Default: beside FILE, with the usual suffix of the format.",
        ),
    ]
    force: Annotated[bool, option("-f", "--force", is_flag=True, help="Overwrite a file that exists.")]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document.")]


@click.command("export")
@with_options(ExportOptions)
def command(options: ExportOptions) -> None:
    """Write the trace in FILE for another tool.

    torch-snapshot is the format of torch.cuda.memory._dump_snapshot; memscope import converts it back into the same
    trace. perfetto and chrome are one format, which both open. csv and parquet have one row an allocation.
    """
    file, chosen = options.file, _FORMATS[options.to]
    refuse_pickle(file)
    trace = Trace.load(file)
    output = options.output or file.with_suffix(chosen.suffix)
    require_writable(output, overwrite=options.force)
    with shown_progress() as moved:
        data = chosen.write(trace, moved)
    write_whole(output, data)
    notes = _notes(trace, options.to)
    if options.as_json:
        about = {"trace": str(file), "format": options.to, "file": str(output), "size_bytes": len(data)}
        document = {"schema_version": 1, **about, "allocations": len(trace), "notes": notes}
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{output}: {len(trace):,} allocations, {format_bytes(len(data))}"))
    for note in notes:
        console.print(Text(note, style="dim"))
    console.print(Text(f"Opens in: {chosen.opens_in}"))
    print_next(console, report_words([file]))


def _notes(trace: Trace, to: str) -> list[str]:
    """Sentences on what the file shows differently from the trace."""
    notes = []
    if trace.meta.get("inferred"):
        notes.append(f"inferred from stacks: {', '.join(name.replace('_', ' ') for name in trace.meta['inferred'])}")
    if trace.host is not None and len(trace.host):
        notes.append("memory of the host is left out")
    if to == "torch-snapshot":
        notes.append("addresses and segments come from a replay of PyTorch's allocator: a trace has none")
    if to in ("perfetto", "chrome"):
        notes.append("time is counted in events: one microsecond is one allocation or one free")
        if len(trace) > MOST_SLICES:
            notes.append(f"slices show the {MOST_SLICES:,} largest of {len(trace):,} allocations; counters include all")
    return notes
