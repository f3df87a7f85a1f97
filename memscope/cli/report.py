"""`memscope report`."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from memscope.agreement import agreements
from memscope.cli.grid_report import FORMATS, print_grid
from memscope.cli.progress import shown_progress
from memscope.cli.report_files import Given, told_apart
from memscope.cli.report_json import report_document
from memscope.cli.report_text import csv_text, markdown, print_all
from memscope.cli.trace_files import load_runs
from memscope.effects import Run, Table1, compare
from memscope.errors import MemscopeError, UsageError
from memscope.trace import write_whole

if TYPE_CHECKING:
    from memscope.dashboards.html import Section

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
    other. Table 2, as memscope profile --grid … --json prints it, and on a page a checkpoint plan, as memscope advise
    writes it, may be among the files. The page is one file that works without a network.
    """
    kind = kind or (_SUFFIXES.get(output.suffix.lower(), "html") if output else "html")
    given = told_apart(files)
    _require_use(given, kind)
    if output is None and kind == "html":
        first, *others = given.traces or [grid.path for grid in given.grids]
        output = first.parent / "report.html" if others else first.with_suffix(".html")
    if output is not None:
        _require_writable(output, force)
    runs = [dataclasses.replace(run, textbook=_textbook(run)) for run in load_runs(given.traces)]
    table, note = _table1(runs)
    if kind == "html":
        assert output is not None, "a page has a place"
        write_whole(output, _page(runs, table, given).encode())
        console = Console(highlight=False, soft_wrap=True)
        if note:
            console.print(Text(note, style="dim"))
        console.print(Text(f"Page: {output}"))
        console.print(Text(f"Next: open it in a browser{_next(given.traces)}"))
        return
    console = Console(highlight=False) if output is None else Console(file=io.StringIO(), width=_WIDTH_OF_A_FILE)
    text = _text(kind, runs, given, table, console)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_whole(output, text.encode())
        click.echo(str(output))


def _require_use(given: Given, kind: str) -> None:
    """See that there is something to show, and that the format can hold it.

    Raises:
        UsageError: when not.
    """
    if not given.traces and not given.grids:
        raise UsageError(
            f"{given.plans[0]} is a checkpoint plan: name a trace too, as memscope profile or advise writes it"
        )
    if given.plans and kind != "html":
        raise UsageError(f"{given.plans[0]} is a checkpoint plan, which is drawn on a page only: leave it out")
    if kind == "csv" and len(given.grids) + bool(given.traces) > 1:
        raise UsageError(f"CSV is one table: make one of {given.grids[0].path} by itself")


def _require_writable(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise UsageError(f"{path} exists already: choose another name with -o, or overwrite it with -f")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: make it, or choose another file with -o")


def _page(runs: Sequence[Run], table: Table1, given: Given) -> str:
    from memscope.dashboards.grid_card import grid_card
    from memscope.dashboards.html import html_page
    from memscope.dashboards.page import render_page

    cards = [grid_card(one.grid, one.notes, f"table2-{index}") for index, one in enumerate(given.grids)]
    cards += [_plan_card(path) for path in given.plans]
    if not runs:
        targets = ", ".join(dict.fromkeys(one.grid.target for one in given.grids))
        return html_page(f"memscope: {targets}", targets, cards)
    with shown_progress() as progress:
        return render_page(runs, table, more=cards, progress=progress)


def _plan_card(path: Path) -> Section:
    from memscope.dashboards.plan_page import plan_card
    from memscope.strategies.layer_plan import LayerPlan

    return plan_card(LayerPlan.load(path).layers, path.name)


def _text(kind: str, runs: Sequence[Run], given: Given, table: Table1, console: Console) -> str:
    if kind == "json":
        document = report_document(runs, given.traces, table) | {"table2": [one.document for one in given.grids]}
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    if kind == "csv":
        return csv_text(runs) if runs else FORMATS[".csv"](given.grids[0].grid, given.grids[0].notes)
    if kind == "markdown":
        parts = [markdown(runs, table)] if runs else []
        return "\n".join([*parts, *(FORMATS[".md"](one.grid, one.notes) for one in given.grids)])
    with console.capture() as captured:
        if runs:
            print_all(console, runs, table)
        for one in given.grids:
            print_grid(console, one.grid, one.notes)
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
    others = [run for run in runs[1:] if run.label not in measured]
    if not others:
        return Table1(()), ""
    first = runs[0]
    lacking = [run.label for run in [first, *others] if not run.trace.steps or not run.trace.meta.get("flops")]
    if lacking:
        return Table1(()), f"No Table 1: steps and operations are not known of {', '.join(lacking)}"
    return compare(first.trace, others), ""


def _next(traces: Sequence[Path]) -> str:
    match traces:
        case []:
            return ""
        case [trace]:
            return f"; memscope export {trace} --to perfetto|torch-snapshot|csv"
    return f"; memscope diff {traces[0]} {traces[1]}"
