"""What `memscope profile` shows: tables, the JSON document, the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.effects import ROWS, Effect, Run, Table1
from memscope.errors import UsageError
from memscope.ledger import Ledger, ledger
from memscope.trace import CATEGORIES, Trace, write_whole
from memscope.units import format_bytes, format_change

__all__ = ["document", "print_report", "write_page"]

_TITLES = {
    "parameter": "parameter (+ weight copies)",
    "activation": "activation",
    "gradient": "gradient",
    "optimizer_state": "optimizer state",
    "computation": "computation (FLOPs)",
}
_ONLY_ADDED = ("context", "unexplained", "others")
"""Lines of the ledger whose total no tool shows."""
_COLOR = {"↑": "red", "↓": "green", "–": ""}


def print_report(
    console: Console, runs: Sequence[Run], table: Table1, baselines: Sequence[str], folder: Path, html: Path
) -> None:
    """Where the memory is at each run's peak, Table 1 with its notes, and what to do next.

    `baselines` says in words what strategies asked of the baseline, for a fair comparison.
    """
    device = runs[0].trace.meta["device"]
    how = (
        "simulated: nothing was computed, sizes are exact for this sequence of allocations"
        if device["simulated"]
        else "measured"
    )
    console.print(Text(f"{runs[0].trace.meta['target']} on {device['name']} ({how})", style="bold"))
    console.print(_peaks(runs))
    ledgers = [ledger(run.trace) for run in runs]
    if all(ledgers):
        console.print(_ledger_table(runs, [found for found in ledgers if found]))
        for note in sorted({found.note for found in ledgers if found and found.note}):
            console.print(Text(note, style="dim"))
    for run in runs:
        if run.trace.meta.get("out_of_memory"):
            console.print(Text.assemble((f"{run.label} does not fit: ", "bold red"), _ran_out(run.trace)))
    for run in runs:
        counts = run.trace.meta["parameters"]
        share = counts["trainable"] / counts["total"]
        if counts["trainable"] != counts["total"]:
            console.print(
                f"{run.label}: {counts['trainable']:,} of {counts['total']:,} parameters are trained ({share:.2%})"
            )
    if table.columns:
        console.print(_table1(table))
        console.print(Text(_rests_on(table, baselines), style="dim"))
        for column in table.columns:
            for effect in column.effects:
                if effect.note:
                    console.print(Text.assemble((f"{column.label}, {_TITLES[effect.row]}: ", "bold"), effect.note))
    console.print(f"\nPage: {html}   Traces: {folder}")
    console.print("Next: open the page; compare plans with  memscope profile TARGET -s lora -s lora,ckpt")


def _rests_on(table: Table1, baselines: Sequence[str]) -> str:
    """The comparison behind every column, in one line; columns of one profile all have the same steps."""
    return ". ".join([f"Each column: {table.columns[0].comparison}", *(f"Baseline: {text}" for text in baselines)])


def _peaks(runs: Sequence[Run]) -> Table:
    table = Table(title="Allocated at the peak")
    table.add_column("")
    for run in runs:
        table.add_column(run.label, justify="right")
    peaks = [run.trace.peak for run in runs]
    table.add_row("peak", *(Text(format_bytes(p.allocated_bytes), style="bold") for p in peaks))
    table.add_row("at", *(f"step {p.step}, {p.phase}" for p in peaks), end_section=True)
    columns = [run.trace.by_category() for run in runs]
    for category in CATEGORIES:
        if any(column[category] for column in columns):
            table.add_row(category.replace("_", " "), *(format_bytes(c[category]) for c in columns))
    return table


def _ledger_table(runs: Sequence[Run], ledgers: Sequence[Ledger]) -> Table:
    table = Table(title="What other tools show")
    table.add_column("")
    for run in runs:
        table.add_column(run.label, justify="right")
    table.add_column("seen in", style="dim")
    longest = max(ledgers, key=lambda found: len(found.lines))
    for line in longest.lines:
        name = f"{line.name} (estimate)" if line.estimate else line.name
        table.add_row(name, *(_ledger_cell(found, line.name) for found in ledgers), line.seen_in)
    return table


def _ledger_cell(found: Ledger, name: str) -> str:
    total = found.total(name)
    if total is None:
        return ""
    return format_change(found[name].added) if name in _ONLY_ADDED else format_bytes(total)


def _ran_out(trace: Trace) -> str:
    """Where and by what the device runs out, and what fills it."""
    oom = trace.meta["out_of_memory"]
    when = f"step {oom['step']}, {oom['phase']}" if oom["step"] >= 0 else "setup, before the first step"
    largest = sorted(oom["by_category"].items(), key=lambda item: -item[1])[:3]
    filled = ", ".join(f"{category.replace('_', ' ')} {format_bytes(size)}" for category, size in largest if size)
    simulated = trace.meta["device"]["simulated"]
    shown = "what is shown is what it would need" if simulated else "what is shown ends there"
    return (
        f"runs out in {when}, {oom['module']}, "
        f"asking {format_bytes(oom['requested'])} with {format_bytes(oom['reserved'])} of {format_bytes(oom['limit'])} "
        f"taken ({filled}); {shown}"
    )


def _table1(table: Table1) -> Table:
    shown = Table(title="Table 1: what each strategy changes")
    shown.add_column("")
    for column in table.columns:
        shown.add_column(column.label, justify="right")
    for row in ROWS:
        shown.add_row(_TITLES[row], *(_cell(column[row]) for column in table.columns))
        if row == "parameter":
            for index, part in enumerate(("parameter", "weight_copy")):
                sizes = (column[row].parts[index][1:] for column in table.columns)
                shown.add_row(f"  {part.replace('_', ' ')}", *(Text(_plain(*s), style="dim") for s in sizes))
        if row == "computation" and any(column[row].seconds for column in table.columns):
            shown.add_row("  seconds a step", *(Text(_seconds(column[row]), style="dim") for column in table.columns))
    return shown


def _cell(effect: Effect) -> Text:
    return Text(str(effect), style=_COLOR[effect.arrow])


def _plain(before: int, after: int) -> str:
    return f"{format_bytes(before)} → {format_bytes(after)}"


def _seconds(effect: Effect) -> str:
    return f"{effect.seconds[0]:.3f} → {effect.seconds[1]:.3f}" if effect.seconds else ""


def document(target: str, runs: Sequence[Run], paths: Sequence[Path], table: Table1) -> dict[str, Any]:
    """Everything as one JSON value, sizes in bytes."""
    return {
        "schema_version": 1,
        "target": target,
        "device": runs[0].trace.meta["device"],
        "runs": [_run(run, path) for run, path in zip(runs, paths, strict=True)],
        "table1": table.arrows(),
        "effects": {
            column.label: {
                e.row: {"arrow": e.arrow, "before": e.before, "after": e.after, "note": e.note or None}
                for e in column.effects
            }
            for column in table.columns
        },
    }


def _run(run: Run, path: Path) -> dict[str, Any]:
    trace, peak = run.trace, run.trace.peak
    seconds, found = trace.meta["seconds"], ledger(run.trace)
    totals = {name: found.total(name) if found else None for name in ("requested", "reserved", "device")}
    return {
        "strategies": trace.meta["strategies"],
        "parameters": trace.meta["parameters"],
        "peak": {
            "requested": totals["requested"],
            "allocated": peak.allocated_bytes,
            "active": trace.meta.get("peak_active", peak.allocated_bytes) if found else None,
            "reserved": totals["reserved"],
            "device": totals["device"],
            "phase": peak.phase,
            "step": peak.step,
        },
        "out_of_memory": trace.meta.get("out_of_memory"),
        "at_peak": trace.by_category(),
        "max_by_category": trace.max_by_category(),
        "flops": trace.meta["flops"][-1],
        "seconds": seconds[-1] if seconds else None,
        "trace": str(path),
    }


def write_page(runs: Sequence[Run], table: Table1, baselines: Sequence[str], path: Path, *, overwrite: bool) -> None:
    """One HTML page with a timeline for each run and Table 1.

    Raises:
        UsageError: when the file exists and `overwrite` is False.
    """
    from memscope.dashboards.page import EffectRow, EffectsTable, PageRun, render_page

    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: choose another name with --html, or overwrite with -f")
    effects = None
    if table.columns:
        rows = [EffectRow(_TITLES[row], [str(column[row]) for column in table.columns]) for row in ROWS]
        effects = EffectsTable(["", *(column.label for column in table.columns)], rows, _rests_on(table, baselines))
    page = render_page([PageRun(run.label, run.trace) for run in runs], effects)
    write_whole(path, page.encode())
