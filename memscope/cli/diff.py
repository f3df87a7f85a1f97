"""`memscope diff`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.analysis.alive import occasion
from memscope.analysis.diff import AllocationChange, Change, Difference, diff
from memscope.analysis.inferred import inferred_columns, marked
from memscope.analysis.notes import notes_of
from memscope.cli.next_command import print_next, report_words
from memscope.cli.report_text import markdown_table
from memscope.cli.tables import print_table
from memscope.cli.trace_files import load_run
from memscope.command.options import FILE, argument, option, with_options
from memscope.trace import Peak, Trace
from memscope.units import format_bytes, format_change

__all__ = ["command"]

_SIDES = ("before", "after")
_TOP = 10
"""Number of modules and of allocations in tables; the JSON document has all."""


@dataclass(frozen=True)
class DiffOptions:
    """The options of `memscope diff`."""

    before: Annotated[Path, argument(type=FILE)]
    after: Annotated[Path, argument(type=FILE)]
    kind: Annotated[
        str,
        option(
            "--format",
            type=click.Choice(["terminal", "markdown", "json"]),
            default="terminal",
            show_default=True,
            help="Format of the output.",
        ),
    ]
    as_json: Annotated[bool, option("--json", is_flag=True, help="The same as --format json.")]


@click.command("diff")
@with_options(DiffOptions)
def command(options: DiffOptions) -> None:
    """Show what grew and shrank from the trace BEFORE to the trace AFTER, and which settings differ.

    Each run is taken at its own peak. Allocations are matched by module, operator and phase: those of equal size first,
    the others in the order of allocation. Traces of different targets can be compared, too.
    """
    files = options.before, options.after
    traces = load_run(options.before).trace, load_run(options.after).trace
    found = diff(*traces)
    notes = [*_of_traces(files, traces), *_notes(found)]
    if options.as_json or options.kind == "json":
        sides = dict(zip(_SIDES, traces, strict=True))
        inferred = {"inferred": {name: list(inferred_columns(one)) for name, one in sides.items()}}
        told = {"notes": {name: notes_of(one) for name, one in sides.items()}}
        names = dict(zip(_SIDES, map(str, files), strict=True))
        document = {"schema_version": 1, **names, **inferred, **told, **_document(found)}
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    elif options.kind == "markdown":
        click.echo("\n".join(_markdown(_headline(found, *files), notes, _tables(found, traces))))
    else:
        console = Console(highlight=False)
        console.print(Text(_headline(found, *files), style="bold"))
        for note in notes:
            console.print(Text(note))
        for table in _tables(found, traces):
            print_table(console, table)
        print_next(console, report_words(list(dict.fromkeys(files))))


def _headline(found: Difference, before: Path, after: Path) -> str:
    if not found:
        return f"{before} → {after}: no difference in memory"
    old, new = format_bytes(found.peak.before), format_bytes(found.peak.after)
    share = f", {found.peak.change / found.peak.before:+.1%}" if found.peak.before else ""
    where = f"peak in {_moment(found.peak_before)} → {_moment(found.peak_after)}"
    return f"{before} → {after}: {old} → {new} ({format_change(found.peak.change)}{share}); {where}"


def _moment(peak: Peak) -> str:
    return occasion(peak.step, peak.phase, peak.micro_batch)


def _of_traces(files: Sequence[Path], traces: Sequence[Trace]) -> Iterable[str]:
    """The notes of each trace."""
    for path, trace in zip(files, traces, strict=True):
        yield from (f"{path}: {note}" for note in notes_of(trace))


def _notes(found: Difference) -> Iterable[str]:
    """The settings that differ: the recorded part of the reason."""
    if not found.same_target:
        yield "The traces are of different targets: modules are matched by name."
    if found.host.change:
        before, after = map(format_bytes, (found.host.before, found.host.after))
        yield f"Memory on the host at its peak: {before} → {after} ({format_change(found.host.change)})."
    for setting in found.settings:
        yield f"Differs: {setting.name}: {_value(setting.before)} → {_value(setting.after)}"
    if found and not found.settings:
        yield "No recorded setting differs: the change is in the code or the data."


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _tables(found: Difference, traces: Sequence[Trace]) -> Iterable[Table]:
    if found.categories:
        yield _bytes_table(
            "By category, at the peak",
            marked("category", "category", *traces),
            {_spaced(name): change for name, change in found.categories.items()},
        )
    if found.modules:
        yield _bytes_table("By module, at the peak", marked("module", "module", *traces), found.modules)
    if found.allocations:
        yield _allocations_table(marked("module, operator", "module", *traces), found.allocations)
    if found.steps:
        columns = ("before", "after", "change", marked("mostly", "category", *traces))
        table = _table("By step", marked("step", "step", *traces), *columns)
        for step in found.steps:
            parts = ", ".join(
                f"{_spaced(name)} {format_change(c.change)}" for name, c in list(step.categories.items())[:3]
            )
            table.add_row(f"step {step.step}", *_sizes(step), parts)
        yield table


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for heading in headings:
        sizes = heading in ("before", "after", "change", "count")
        table.add_column(heading, justify="right" if sizes else "left", no_wrap=sizes, overflow="fold")
    return table


def _bytes_table(title: str, first: str, changes: Mapping[str, Change]) -> Table:
    table = _table(title, first, "before", "after", "change")
    for name, change in list(changes.items())[:_TOP]:
        table.add_row(Text(name or "no module"), *_sizes(change))
    _say_how_many_more(table, len(changes))
    return table


def _allocations_table(first: str, changes: tuple[AllocationChange, ...]) -> Table:
    table = _table("By allocation, at the peak", first, "kind", "count", "before", "after", "change")
    for one in changes[:_TOP]:
        where = ", ".join(name for name in (one.module, one.op) if name)
        table.add_row(
            Text(f"{where} ({_spaced(one.category)}, {_spaced(one.phase)})"), _what(one), str(one.count), *_sizes(one)
        )
    _say_how_many_more(table, len(changes))
    return table


def _what(one: AllocationChange) -> str:
    if one.freed_before and one.freed_after and one.freed_before != one.freed_after:
        return f"{one.kind}: freed in {_spaced(one.freed_before)} → {_spaced(one.freed_after)}"
    return one.kind


def _spaced(name: str) -> str:
    """A category or phase as people read it."""
    return name.replace("_", " ")


def _say_how_many_more(table: Table, count: int) -> None:
    if count > _TOP:
        table.caption = f"and {count - _TOP:,} smaller ones; --json lists all"


def _sizes(change: Change) -> tuple[str, str, Text]:
    style = "red" if change.change > 0 else "green" if change.change < 0 else ""
    return format_bytes(change.before), format_bytes(change.after), Text(format_change(change.change), style=style)


def _markdown(headline: str, notes: Iterable[str], tables: Iterable[Table]) -> Iterable[str]:
    yield f"**{headline}**"
    yield ""
    yield from (f"- {note}" for note in notes)
    for table in tables:
        yield ""
        yield from markdown_table(table)


def _document(found: Difference) -> dict[str, Any]:
    """Everything, sizes in bytes."""
    return {
        "peak": {
            **_pair(found.peak),
            "moment_before": found.peak_before._asdict(),
            "moment_after": found.peak_after._asdict(),
        },
        "host": _pair(found.host),
        "same_target": found.same_target,
        "settings": [dataclasses.asdict(setting) for setting in found.settings],
        "categories": {name: _pair(change) for name, change in found.categories.items()},
        "modules": {name: _pair(change) for name, change in found.modules.items()},
        "allocations": [{**dataclasses.asdict(one), "change": one.change} for one in found.allocations],
        "steps": [
            {"step": one.step, **_pair(one), "categories": {n: _pair(c) for n, c in one.categories.items()}}
            for one in found.steps
        ],
    }


def _pair(change: Change) -> dict[str, int]:
    return {"before": change.before, "after": change.after, "change": change.change}
