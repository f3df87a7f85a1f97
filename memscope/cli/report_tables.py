"""Runs as tables with notes: memory at each peak, the ledger, the effects of strategies, the largest allocations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from memscope.analysis.agreement import Agreement, agreements
from memscope.analysis.alive import largest, occasion
from memscope.analysis.chosen import chosen_settings
from memscope.analysis.cost import last_step_seconds, step_seconds, total_seconds
from memscope.analysis.effects import TITLES, Column, Effect, Run, Table1
from memscope.analysis.fit import KNOWN_ERROR, fit_of
from memscope.analysis.host import host_peak
from memscope.analysis.inferred import marked
from memscope.analysis.ledger import Ledger, ledger
from memscope.analysis.notes import notes_of
from memscope.analysis.ran_out import ran_out
from memscope.cli.report_sections import run_sections, settings_notes
from memscope.cli.table_sections import TableSection
from memscope.trace import CATEGORIES, Trace
from memscope.units import format_bytes, format_change, format_part, format_seconds

__all__ = [
    "comparison_sections", "estimated_seconds", "fit_lines", "headline", "largest_sections", "rests_on",
]  # fmt: skip

_TOP = 10
"""Number of the largest allocations that are listed for each run."""
_ONLY_ADDED = ("context", "unexplained", "others")
"""Lines of the ledger whose total no tool shows."""
_COLOR = {"↑": "red", "↓": "green", "–": ""}


def headline(trace: Trace) -> str:
    """`llama2 on a100-40gb (simulated: …)`."""
    match trace.meta.get("device"):
        case {"name": name, "simulated": True}:
            how = f" on {name} (simulated: nothing was computed, sizes are exact for this sequence of allocations)"
        case {"name": name}:
            how = f" on {name} (measured)"
        case _:
            how = ""
    return f"{trace.meta.get('target', 'a run')}{how}"


def fit_lines(runs: Sequence[Run]) -> Iterator[Text]:
    """Whether each run fits into the memory of its device, where that is limited, and the known error of the "fits".

    The lines stand above the tables, whose values they explain.
    """
    known = False
    for run in runs:
        fit = fit_of(run.trace)
        if run.trace.meta.get("out_of_memory"):
            yield Text.assemble((f"{run.label} does not fit: ", "bold red"), ran_out(run.trace))
        elif fit is not None:
            known = True
            part = format_part(fit.needed_bytes, fit.available_bytes)
            yield Text.assemble((f"{run.label} {fit.verdict}: ", "green" if fit.is_safe else "yellow"), part)
    if known:
        yield Text(KNOWN_ERROR, style="dim")


def comparison_sections(runs: Sequence[Run], table: Table1, baselines: Sequence[str]) -> Iterator[TableSection]:
    """The peak of each run, the ledgers, Table 1, and predictions against measurements.

    `baselines` says in words what strategies asked of the baseline, for a fair comparison.
    """
    yield TableSection(runs, _peaks, [*_trained(runs), *_noted(runs), *settings_notes(runs)])
    yield from run_sections(runs)
    if all(ledger(run.trace) for run in runs):
        notes = sorted({found.note for run in runs if (found := ledger(run.trace)) and found.note})
        yield TableSection(runs, _ledgers, [Text(note, style="dim") for note in notes])
    if table.columns:
        effects = [(column, effect) for column in table.columns for effect in column.effects if effect.note]
        notes_of = [
            Text.assemble((f"{column.label}, {TITLES[effect.row]}: ", "bold"), effect.note)
            for column, effect in effects
        ]
        yield TableSection(table.columns, _table1, [Text(rests_on(table, baselines), style="dim"), *notes_of])
    for one in agreements(runs):
        yield TableSection([one], _agreement, stacked="rows")


def largest_sections(runs: Sequence[Run]) -> Iterator[TableSection]:
    """The largest allocations at the peak of each run."""
    for run in runs:
        yield TableSection([run], _largest, stacked="rows")


def _empty_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    return table


def rests_on(table: Table1, baselines: Sequence[str]) -> str:
    """One line on the comparison behind the columns; all columns of a profile compare the same steps."""
    return ". ".join([f"Each column: {table.columns[0].comparison}", *(f"Baseline: {text}" for text in baselines)])


def _peaks(runs: Sequence[Run]) -> Table:
    table = _empty_table("Allocated at the peak", [run.label for run in runs])
    peaks = [run.trace.peak for run in runs]
    table.add_row("peak", *(Text(format_bytes(p.allocated_bytes), style="bold") for p in peaks))
    table.add_row("at", *(occasion(p.step, p.phase).replace(" · ", ", ") for p in peaks), end_section=True)
    columns = [run.trace.by_category() for run in runs]
    for category in CATEGORIES:
        if any(column[category] for column in columns):
            name = marked(category.replace("_", " "), "category", *(run.trace for run in runs))
            table.add_row(name, *(format_bytes(c[category]) for c in columns))
    hosts = [host_peak(run.trace) for run in runs]
    if any(hosts):
        table.add_section()
        table.add_row("host, at its peak", *(Text(format_bytes(h.allocated_bytes) if h else "") for h in hosts))
        for category in CATEGORIES:
            if any(h and category in h.by_category for h in hosts):
                sizes = (format_bytes(h.by_category.get(category, 0)) if h else "" for h in hosts)
                table.add_row(f"  {category.replace('_', ' ')}", *sizes)
        table.add_row("host, taken", *(format_bytes(h.reserved_bytes) if h else "" for h in hosts))
    times = [last_step_seconds(run.trace) for run in runs]
    if any(times):
        estimates = any(seconds and not run.trace.meta.get("seconds") for seconds, run in zip(times, runs, strict=True))
        table.add_section()
        name = "step time (estimate)" if estimates else "step time"
        table.add_row(name, *("" if seconds is None else format_seconds(seconds) for seconds in times))
    return table


def estimated_seconds(trace: Trace) -> dict[str, Any] | None:
    """Estimated seconds of the last step, as `step`, and of its `phases`; None where there is no estimate."""
    phases = step_seconds(trace, trace.steps[-1]) if trace.steps else None
    return None if phases is None else {"step": total_seconds(phases), "phases": phases}


def _ledgers(runs: Sequence[Run]) -> Table:
    ledgers = [found for run in runs if (found := ledger(run.trace))]
    table = _empty_table("What other tools show", [run.label for run in runs])
    table.add_column("seen in", style="dim", overflow="fold")
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


def _trained(runs: Sequence[Run]) -> Iterator[Text]:
    for run in runs:
        match run.trace.meta.get("parameters"):
            case {"total": int(total), "trainable": int(trained)} if trained != total:
                share = trained / max(total, 1)
                chosen = [f"{key}={value}" for one in chosen_settings(run.trace).values() for key, value in one.items()]
                words = "; ".join([f"{trained:,} of {total:,} parameters ({share:.2%})", *chosen])
                yield Text(f"{run.label} trains {words}")


def _noted(runs: Sequence[Run]) -> Iterator[Text]:
    for run in runs:
        for note in notes_of(run.trace):
            yield Text(f"{run.label}: {note}", style="yellow")


def _table1(columns: Sequence[Column]) -> Table:
    shown = _empty_table("Table 1: what each strategy changes", [column.label for column in columns])
    for row in (effect.row for effect in columns[0].effects):
        shown.add_row(TITLES[row], *(_cell(column[row]) for column in columns))
        if row == "parameter":
            for index, part in enumerate(("parameter", "weight_copy")):
                sizes = (column[row].parts[index][1:] for column in columns)
                shown.add_row(f"  {part.replace('_', ' ')}", *(Text(_plain(*s), style="dim") for s in sizes))
        if row == "computation" and any(column[row].seconds for column in columns):
            shown.add_row("  time a step", *(Text(_seconds(column[row]), style="dim") for column in columns))
    return shown


def _cell(effect: Effect) -> Text:
    return Text(str(effect), style=_COLOR[effect.arrow])


def _plain(before: int, after: int) -> str:
    return f"{format_bytes(before)} → {format_bytes(after)}"


def _seconds(effect: Effect) -> str:
    return " → ".join(map(format_seconds, effect.seconds)) if effect.seconds else ""


def _agreement(one: Sequence[Agreement]) -> Table:
    (found,) = one
    headings = [f"{found.predicted} (predicted)", f"{found.measured} (measured)", "difference", "of measured"]
    table = _empty_table("Predicted against measured", headings)
    for row in found.figures:
        sizes = format_bytes(row.predicted), format_bytes(row.measured), format_change(row.predicted - row.measured)
        table.add_row(row.name.replace("_", " "), *sizes, str(row))
    return table


def _largest(one: Sequence[Run]) -> Table:
    (run,) = one
    table = Table(title=Text(f"Largest allocations at the peak of {run.label}"))
    table.add_column("size", justify="right", no_wrap=True)
    for heading, column in (("category",) * 2, ("module, operator", "module"), ("allocated in", "phase")):
        table.add_column(marked(heading, column, run.trace), overflow="fold")
    table.add_column("freed in", overflow="fold")
    for found in largest(run.trace, _TOP):
        where = ", ".join(name for name in (found.module, found.op) if name)
        size, category = format_bytes(found.size_bytes), found.category.replace("_", " ")
        table.add_row(size, category, Text(where), found.born_in, found.freed_in or "never")
    peak = run.trace.peak
    table.caption = f"{len(run.trace.at(peak.event)):,} allocations alive in {occasion(peak.step, peak.phase)}"
    return table
