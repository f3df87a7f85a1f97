"""`memscope export`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from memscope.cli.progress import shown_progress
from memscope.cli.trace_files import refuse_pickle
from memscope.errors import UsageError
from memscope.exchange.chrome_trace import MOST_SLICES, chrome_trace_bytes
from memscope.exchange.tables import csv_bytes, parquet_bytes
from memscope.exchange.torch_writer import torch_snapshot_bytes
from memscope.trace import Progress, Trace, write_whole
from memscope.units import format_bytes

__all__ = ["command"]


@dataclass(frozen=True)
class _Format:
    suffix: str
    write: Callable[[Trace, Progress], bytes]
    next_step: str
    """What to do with the file, `{file}`."""


_FORMATS = {
    "torch-snapshot": _Format(
        ".pickle",
        torch_snapshot_bytes,
        "drop {file} onto https://pytorch.org/memory_viz, or  python -m torch.cuda._memory_viz trace_plot {file}",
    ),
    "perfetto": _Format(".trace.json", chrome_trace_bytes, "open {file} at https://ui.perfetto.dev"),
    "chrome": _Format(".trace.json", chrome_trace_bytes, "load {file} at chrome://tracing"),
    "csv": _Format(".csv", csv_bytes, "pandas.read_csv('{file}'), or see it:  memscope report {trace}"),
    "parquet": _Format(".parquet", parquet_bytes, "pandas.read_parquet('{file}'), or see it:  memscope report {trace}"),
}


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", "to", required=True, type=click.Choice(list(_FORMATS)), help="What to write.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where it goes. Default: beside FILE, with the usual suffix at the end.",
)
@click.option("-f", "--force", is_flag=True, help="Overwrite a file that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(file: Path, to: str, output: Path | None, force: bool, as_json: bool, debug: bool) -> None:
    """Write the trace in FILE for another tool.

    torch-snapshot is what torch.cuda.memory._dump_snapshot writes; memscope import turns it back into the same trace.
    perfetto and chrome are the same format, which both open. csv and parquet have one row an allocation.
    """
    refuse_pickle(file)
    trace, chosen = Trace.load(file), _FORMATS[to]
    output = output or file.with_suffix(chosen.suffix)
    if output.exists() and not force:
        raise UsageError(f"{output} exists already: choose another name with -o, or overwrite it with -f")
    with shown_progress() as progress:
        data = chosen.write(trace, progress)
    write_whole(output, data)
    notes = _notes(trace, to)
    if as_json:
        about = {"trace": str(file), "format": to, "file": str(output), "size_bytes": len(data)}
        document = {"schema_version": 1, **about, "allocations": len(trace), "notes": notes}
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{output}: {len(trace):,} allocations, {format_bytes(len(data))}")
    for note in notes:
        console.print(Text(note, style="dim"))
    console.print(f"Next: {chosen.next_step.format(file=output, trace=file)}", markup=False)


def _notes(trace: Trace, to: str) -> list[str]:
    """What the file shows otherwise than the trace does."""
    notes = []
    if "inferred" in trace.meta:
        notes.append(f"inferred from stacks: {', '.join(trace.meta['inferred'])}")
    if to == "torch-snapshot":
        notes.append("addresses and segments are those of a replay of PyTorch's allocator: a trace has none")
    if to in ("perfetto", "chrome"):
        notes.append("time is counted in events: one microsecond is one allocation or release")
        if len(trace) > MOST_SLICES:
            notes.append(
                f"the {MOST_SLICES:,} largest of {len(trace):,} allocations are slices; counters have them all"
            )
    return notes
