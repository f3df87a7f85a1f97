"""`memscope report`."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from memscope.agreement import agreements
from memscope.cli.progress import shown_progress
from memscope.cli.report_json import report_document
from memscope.cli.report_text import csv_text, markdown, print_all
from memscope.cli.trace_files import load_runs
from memscope.effects import Run, Table1, compare
from memscope.errors import MemscopeError, UsageError
from memscope.trace import write_whole

__all__ = ["command"]

_SUFFIXES = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".csv": "csv", ".txt": "terminal"}
_WIDTH_OF_A_FILE = 120


@click.command("report")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "-o",
    "--html",
    "output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where it goes. A page: beside the first trace if not given; anything else: to the terminal.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["html", "terminal", "markdown", "json", "csv"]),
    help="What to make of it; by the ending of -o, else an HTML page.",
)
@click.option("-f", "--force", is_flag=True, help="Overwrite a file that exists.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(files: tuple[Path, ...], output: Path | None, kind: str | None, force: bool, debug: bool) -> None:
    """Show the traces in FILES: memory over time, what is alive at any moment, ledger, allocator.

    Several traces are compared with the first. A simulated and a measured trace of the same plan are held against each
    other. A checkpoint plan, as memscope advise writes it, may be among the files of a page. The page is one file that
    works without a network.
    """
    kind = kind or (_SUFFIXES.get(output.suffix.lower(), "html") if output else "html")
    plans = [file for file in files if file.suffix.lower() == ".json"]
    traces = [file for file in files if file not in plans]
    if not traces:
        raise UsageError(f"{files[0]} is a checkpoint plan: name a trace too, as memscope profile or advise writes it")
    if output is None and kind == "html":
        output = traces[0].with_suffix(".html") if len(traces) == 1 else traces[0].parent / "report.html"
    if output is not None:
        _require_writable(output, force)
    runs = [dataclasses.replace(run, textbook=_textbook(run)) for run in load_runs(traces)]
    table, note = _table1(runs)
    if kind == "html":
        assert output is not None, "a page has a place"
        write_whole(output, _page(runs, table, plans).encode())
        console = Console(highlight=False, soft_wrap=True)
        if note:
            console.print(Text(note, style="dim"))
        console.print(Text(f"Page: {output}"))
        console.print(Text(f"Next: open it in a browser; {_next(traces)}"))
        return
    console = Console(highlight=False) if output is None else Console(file=io.StringIO(), width=_WIDTH_OF_A_FILE)
    text = _text(kind, runs, traces, table, console)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_whole(output, text.encode())
        click.echo(str(output))


def _require_writable(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise UsageError(f"{path} exists already: choose another name with -o, or overwrite it with -f")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: make it, or choose another file with -o")


def _page(runs: Sequence[Run], table: Table1, plans: Sequence[Path]) -> str:
    from memscope.dashboards.page import render_page

    with shown_progress() as progress:
        return render_page(runs, table, more=[_plan_card(path) for path in plans], progress=progress)


def _plan_card(path: Path) -> str:
    from memscope.dashboards.plan_page import plan_card
    from memscope.strategies.layer_plan import LayerPlan

    return plan_card(LayerPlan.load(path).layers, path.name)


def _text(kind: str, runs: Sequence[Run], traces: Sequence[Path], table: Table1, console: Console) -> str:
    if kind == "json":
        return json.dumps(report_document(runs, traces, table), ensure_ascii=False, indent=2) + "\n"
    if kind == "csv":
        return csv_text(runs)
    if kind == "markdown":
        return markdown(runs, table)
    with console.capture() as captured:
        print_all(console, runs, table)
    return captured.get()


def _textbook(run: Run) -> dict[str, str]:
    """What is usually said of the one strategy of a run; nothing of several, or of one that is not installed here."""
    match run.trace.meta.get("strategies"):
        case [str(spec)]:
            from memscope.strategies import Plan

            try:
                return dict(Plan.parse(spec).strategies[0].textbook)
            except MemscopeError:
                return {}
    return {}


def _table1(runs: Sequence[Run]) -> tuple[Table1, str]:
    """Each run against the first; and why there is none."""
    measured = {found.measured for found in agreements(runs)}
    first, *others = runs
    others = [run for run in others if run.label not in measured]
    if not others:
        return Table1(()), ""
    lacking = [run.label for run in [first, *others] if not run.trace.steps or not run.trace.meta.get("flops")]
    if lacking:
        return Table1(()), f"No Table 1: steps and operations are not known of {', '.join(lacking)}"
    return compare(first.trace, others), ""


def _next(traces: Sequence[Path]) -> str:
    if len(traces) == 1:
        return f"memscope export {traces[0]} --to perfetto|torch-snapshot|csv"
    return f"memscope diff {traces[0]} {traces[1]}"
