"""The output of `memscope profile`: tables, the JSON document, the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from memscope.analysis.chosen import chosen_settings
from memscope.analysis.effects import Run, Table1
from memscope.analysis.notes import told_notes
from memscope.cli.report_json import course_values, effects_values, fit_values, peak_values
from memscope.cli.report_tables import comparison_sections, estimated_seconds, fit_lines, headline
from memscope.cli.table_sections import print_sections
from memscope.runs.would_free import Remedies, WouldFree
from memscope.trace import write_whole
from memscope.units import format_bytes, format_change

if TYPE_CHECKING:
    from memscope.dashboards.html import Section

__all__ = ["document", "print_places", "print_remedies", "print_report", "write_page"]


def print_report(console: Console, runs: Sequence[Run], table: Table1, baselines: Sequence[str]) -> None:
    """Print the memory at the peak of each run, and Table 1 with its notes.

    `baselines` says in words what strategies asked of the baseline, for a fair comparison.
    """
    console.print(Text(headline(runs[0].trace), style="bold"))
    for note in fit_lines(runs):
        console.print(note)
    print_sections(console, comparison_sections(runs, table, baselines))


def print_remedies(console: Console, label: str, remedies: Remedies) -> None:
    """Print what each further strategy would free of a run that does not fit."""
    helpful = [one for one in remedies.tried if one.change_bytes < 0]
    if helpful:
        console.print(Text(f"Strategies that would help {label}, simulated together with it:", style="bold"))
    longest = max((len(one.strategy.spec) for one in helpful), default=0)
    for one in helpful:
        size = format_bytes(one.trace.peak.allocated_bytes)
        fits = one.fit.verdict, "green" if one.fit.is_safe else "yellow" if one.fit.fits else "red"
        changes = "" if one.is_exact else f"; changes {one.strategy.changes or 'the result'}"
        changes += f"; takes {one.strategy.takes_more}" if one.strategy.takes_more else ""
        change = f"{one.strategy.spec:{longest}}  {format_change(one.change_bytes):>9}"
        console.print(Text.assemble(f"  {change}  ({size}, ", fits, f"){changes}"))
    useless = [f"{one.strategy.spec} ({format_change(one.change_bytes)})" for one in remedies.tried[len(helpful) :]]
    if useless:
        console.print(f"Strategies that would not help {label}: {', '.join(useless)}")
    for name, error in remedies.failed.items():
        console.print(Text(f"{name} could not be simulated: {error}", style="dim"))


def print_places(console: Console, folder: Path, page: Path | None) -> None:
    """Print where the page, if it could be written, and the traces are."""
    console.print()
    if page is not None:
        console.print(Text(f"Page: {page}"), soft_wrap=True)
    console.print(Text(f"Traces: {folder}"), soft_wrap=True)


def document(
    target: str, runs: Sequence[Run], paths: Sequence[Path], table: Table1, remedies: Remedies | None
) -> dict[str, Any]:
    """The JSON document, sizes in bytes; `remedies` are for the last run, if it does not fit."""
    remedied = [None] * (len(runs) - 1) + [remedies]
    return {
        "schema_version": 1,
        "target": target,
        "device": runs[0].trace.meta["device"],
        "runs": [_run(*one) for one in zip(runs, paths, remedied, strict=True)],
        "table1": table.arrows(),
        "effects": effects_values(table),
    }


def _run(run: Run, path: Path, remedies: Remedies | None) -> dict[str, Any]:
    trace = run.trace
    seconds = trace.meta["seconds"]
    return {
        "strategies": trace.meta["strategies"],
        "chosen": chosen_settings(trace),
        "parameters": trace.meta["parameters"],
        "peak": peak_values(trace),
        "out_of_memory": trace.meta.get("out_of_memory"),
        "fit": fit_values(trace),
        "would_free": None if remedies is None else [_would_free(one) for one in remedies.tried],
        "at_peak": trace.by_category(),
        "max_by_category": trace.max_by_category(),
        **course_values(trace),
        "flops": trace.meta["flops"][-1],
        "seconds": seconds[-1] if seconds else None,
        "estimated_seconds": estimated_seconds(trace),
        "notes": told_notes(trace),
        "assumptions": trace.meta.get("assumptions", []),
        "trace": str(path),
    }


def _would_free(one: WouldFree) -> dict[str, Any]:
    return {
        "strategy": one.strategy.spec,
        "peak": peak_values(one.trace),
        "change": one.change_bytes,
        "fit": one.fit.document(),
        "exact": one.is_exact,
    }


def write_page(
    runs: Sequence[Run], table: Table1, baselines: Sequence[str], path: Path, *, more: Sequence[Section] = ()
) -> None:
    """Write one HTML page with a timeline for each run and Table 1; `more` are further sections."""
    from memscope.dashboards.page import render_page

    write_whole(path, render_page(runs, table, baselines, more).encode())
