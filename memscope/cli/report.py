"""`memscope report`."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
from rich.console import Console
from rich.text import Text

from memscope.analysis.agreement import agreements
from memscope.analysis.effects import Run, Table1, compare
from memscope.cli.grid_report import FORMATS, print_grid
from memscope.cli.next_command import export_words, page_beside, print_next
from memscope.cli.report_files import GivenFiles, files_by_kind
from memscope.cli.report_json import report_document
from memscope.cli.report_text import csv_text, markdown, print_all
from memscope.cli.trace_files import load_runs
from memscope.command.options import FILE, argument, option, with_options
from memscope.command.output import require_writable
from memscope.command.progress import shown_progress
from memscope.errors import MemscopeError, UsageError
from memscope.trace import write_whole

if TYPE_CHECKING:
    from memscope.dashboards.html import Section

__all__ = ["command"]

_SUFFIXES = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".csv": "csv", ".txt": "terminal"}
_WIDTH_OF_A_FILE = 120


@dataclass(frozen=True)
class ReportOptions:
    """The options of `memscope report`."""

    files: Annotated[tuple[Path, ...], argument(nargs=-1, required=True, type=FILE, metavar="FILE...")]
    output: Annotated[
        Path | None,
        option(
            "-o",
            "--html",
            type=FILE,
            metavar="FILE",
            help="File to write. Default: for a page, beside the first trace; for any other format, the terminal.",
        ),
    ]
    kind: Annotated[
        str | None,
        option(
            "--format",
            type=click.Choice(["html", "terminal", "markdown", "json", "csv"]),
            help="Format of the output. Default: by the suffix of -o, else an HTML page.",
        ),
    ]
    force: Annotated[bool, option("-f", "--force", is_flag=True, help="Overwrite a file that exists.")]


@click.command("report")
@with_options(ReportOptions)
def command(options: ReportOptions) -> None:
    """Show the traces in FILES: memory over time, allocations at the peak, ledger, allocator.

    Several traces are compared with the first. A simulated and a measured trace of the same plan are compared as
    prediction and measurement. FILES may include Table 2, the output of memscope profile --grid … --json, and, for a
    page, a checkpoint plan of memscope advise. The page is one file that works without a network.
    """
    output = options.output
    kind = options.kind or (_SUFFIXES.get(output.suffix.lower(), "html") if output else "html")
    given = files_by_kind(options.files)
    _require_use(given, kind)
    if output is None and kind == "html":
        output = page_beside(given.traces or [grid.path for grid in given.grids])
    if output is not None:
        require_writable(output, overwrite=options.force)
    runs = [dataclasses.replace(run, textbook=_textbook(run)) for run in load_runs(given.traces)]
    table, note = _table1(runs)
    if kind == "html":
        assert output is not None, "a page has a place"
        write_whole(output, _page(runs, table, given).encode())
        console = Console(highlight=False, soft_wrap=True)
        if note:
            console.print(Text(note, style="dim"))
        console.print(Text(f"Page: {output}"))
        print_next(console, _next(given.traces))
        return
    console = Console(highlight=False) if output is None else Console(file=io.StringIO(), width=_WIDTH_OF_A_FILE)
    text = _text(kind, runs, given, table, console)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_whole(output, text.encode())
        click.echo(str(output))


def _require_use(given: GivenFiles, kind: str) -> None:
    """Check that there is something to show, in a format that can hold it.

    Raises:
        UsageError: when not.
    """
    if not given.traces and not given.grids:
        raise UsageError(f"{given.plans[0]} is a checkpoint plan: add a trace of memscope profile")
    if given.plans and kind != "html":
        raise UsageError(f"{given.plans[0]} is a checkpoint plan, which only a page can show: leave it out")
    if kind == "csv" and len(given.grids) + bool(given.traces) > 1:
        raise UsageError(f"CSV is one table: report {given.grids[0].path} by itself")


def _page(runs: Sequence[Run], table: Table1, given: GivenFiles) -> str:
    from memscope.dashboards.grid_card import grid_card
    from memscope.dashboards.html import html_page
    from memscope.dashboards.page import render_page

    cards = [grid_card(one.grid, one.notes, f"table2-{index}") for index, one in enumerate(given.grids)]
    cards += [_plan_card(path) for path in given.plans]
    if not runs:
        targets = ", ".join(dict.fromkeys(one.grid.target for one in given.grids))
        return html_page(f"memscope: {targets}", targets, cards)
    with shown_progress() as moved:
        return render_page(runs, table, more=cards, progress=moved)


def _plan_card(path: Path) -> Section:
    from memscope.dashboards.plan_page import plan_card
    from memscope.strategies.ckpt.layer_plan import LayerPlan

    return plan_card(LayerPlan.load(path).layers, path.name)


def _text(kind: str, runs: Sequence[Run], given: GivenFiles, table: Table1, console: Console) -> str:
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
    """The textbook effects of the strategy of a run; none for several strategies, or one that is not installed here."""
    match run.trace.meta.get("strategies"):
        case [str(spec)]:
            from memscope.strategies import Plan

            try:
                return dict(Plan.parse(spec).strategies[0].textbook)
            except MemscopeError:
                return {}
    return {}


def _table1(runs: Sequence[Run]) -> tuple[Table1, str]:
    """Table 1 of the runs against the first, and the reason if there is none."""
    measured = {found.measured for found in agreements(runs)}
    others = [run for run in runs[1:] if run.label not in measured]
    if not others:
        return Table1(()), ""
    first = runs[0]
    lacking = [run.label for run in [first, *others] if not run.trace.steps or not run.trace.meta.get("flops")]
    if lacking:
        return Table1(()), f"No Table 1: steps or operations are unknown for {', '.join(lacking)}"
    return compare(first.trace, others), ""


def _next(traces: Sequence[Path]) -> Sequence[object]:
    match traces:
        case []:
            return ()
        case [trace]:
            return export_words(trace)
    return ["memscope", "diff", *traces[:2]]
