"""Several runs on a page: their peaks, Table 1, prediction against measurement, and differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from memscope.analysis.agreement import agreements
from memscope.analysis.diff import AllocationChange, Change, Difference, diff
from memscope.analysis.effects import TITLES, Run, Table1
from memscope.analysis.inferred import marked
from memscope.analysis.ledger import ledger
from memscope.analysis.notes import notes_of
from memscope.dashboards.comparison import LEAST_SHARE, difference, is_small, small_multiples
from memscope.dashboards.html import Section, card, code, figure_box, fold, swatch, table
from memscope.dashboards.names import spoken
from memscope.dashboards.timeline import moment
from memscope.trace import CATEGORIES, PHASES, Trace
from memscope.units import format_bytes, format_change

__all__ = ["comparison_sections", "effects_section"]

_TOP = 8
"""Settings, and kinds of allocations, that are listed of a difference."""
_LONGEST_VALUE = 60
_COMPACT_MARGIN = 22
"""Pixels above the small multiples: the page has its own legend."""


def comparison_sections(runs: Sequence[Run]) -> list[Section]:
    """The sections that compare several runs; the first run is compared with each of the others."""
    return [_overview(runs), *_agreement(runs), _differences(runs)]


def effects_section(table1: Table1, baselines: Sequence[str]) -> Section:
    """Table 1, the comparison behind it, and the reasons for unusual arrows."""
    rows = [[TITLES[row], *(escape(str(column[row])) for column in table1.columns)] for row in table1.rows]
    headers = ["", *(escape(column.label) for column in table1.columns)]
    notes = [
        f"{column.label}, {TITLES[effect.row]}: {effect.note}"
        for column in table1.columns
        for effect in column.effects
        if effect.note
    ]
    basis = [f"Each column: {table1.columns[0].comparison}", *(f"Baseline: {text}" for text in baselines)]
    title = "Table 1: what each strategy changes"
    shown = table(headers, rows, "Effect of each strategy on each row", "effects titled")
    told = "".join(f'<p class="note">{escape(text)}</p>' for text in [". ".join(basis), *notes])
    return Section("table1", title, card(shown + told, key="table1", title=title))


def _overview(runs: Sequence[Run]) -> Section:
    highest = max(run.trace.peak.allocated_bytes for run in runs) or 1
    rows = []
    for index, run in enumerate(runs):
        peak, found = run.trace.peak, ledger(run.trace)
        bar = f'<span class="bar" style="--share:{peak.allocated_bytes / highest:.4f}"></span>'
        link = f'<a href="#run{index}">{escape(run.label)}</a>'
        reserved = found.total("reserved") if found else None
        cell = "" if reserved is None else format_bytes(reserved)
        rows.append([link, format_bytes(peak.allocated_bytes), cell, moment(peak), bar])
    headers = ("run", "peak allocated", "peak reserved", "peak in", "")
    listed = table(headers, rows, "Peak of each run", "numbers overview titled")
    label = "Memory over time of every run, on the same axes; the table above has their peaks"
    figure = small_multiples(runs)
    figure.update_layout(
        showlegend=False,
        height=figure.layout.height - figure.layout.margin.t + _COMPACT_MARGIN,
        margin_t=_COMPACT_MARGIN,
    )
    names = {curve.name for curve in figure.data}
    body = f"{listed}{figure_box(figure, label)}{_legend(names)}"
    title = "All runs on the same axes"
    return Section("runs", title, card(body, key="runs", title=title))


def _legend(names: set[str]) -> str:
    """The categories and the phases of a figure, with their colours."""
    groups: tuple[tuple[str, Sequence[str]], ...] = (("categories", CATEGORIES), ("phases", PHASES))
    return "".join(
        f'<ul class="key" aria-label="{kind}">'
        + "".join(f"<li>{swatch(name)}{spoken(name)}</li>" for name in listed if spoken(name) in names)
        + "</ul>"
        for kind, listed in groups
    )


def _agreement(runs: Sequence[Run]) -> list[Section]:
    sections = []
    for number, found in enumerate(agreements(runs)):
        rows = [
            [escape(spoken(one.name)), format_bytes(one.predicted), format_bytes(one.measured),
             format_change(one.predicted - one.measured), str(one)]
            for one in found.figures
        ]  # fmt: skip
        headers = ("", "predicted", "measured", "difference", "share of measured")
        label = f"{found.predicted} (simulated) against {found.measured} (measured), each at its own peak"
        key, title = f"agreement{number}", "Predicted against measured"
        sections.append(Section(key, title, card(table(headers, rows, label, "numbers"), key=key, title=title)))
    return sections


def _differences(runs: Sequence[Run]) -> Section:
    first, *others = runs
    title, folds, parts = "What grew and what shrank", [], []
    for index, run in enumerate(others, start=1):
        found = diff(first.trace, run.trace)
        key, name = f"difference{index}", f"{run.label} against {first.label}"
        gist = f"{format_change(found.peak.change)}, each at its own peak"
        body = _difference(found, first, run, f"{name}: {gist}")
        folds.append(fold(body, key=key, title=name, gist=gist, opened=len(others) == 1))
        parts.append((key, name))
    html = card("".join(folds), key="differences", title=title)
    return Section("differences", title, html, parts=tuple(parts))


def _difference(found: Difference, first: Run, run: Run, label: str) -> str:
    notes = "".join(
        f'<p class="note">{escape(f"{one.label}: {note}")}</p>' for one in (first, run) for note in notes_of(one.trace)
    )
    if not found:
        return f'{_settings(found)}{notes}<p class="note">Nothing changed.</p>'
    changes = [*found.categories.values(), *found.modules.values()]
    drawn = any(not is_small(one.change, found) for one in changes)
    figure = figure_box(difference(first.trace, run.trace, found=found), label) if drawn else ""
    return f"{_settings(found)}{notes}{figure}{_allocations(found, (first.trace, run.trace))}{_small_changes(found)}"


def _settings(found: Difference) -> str:
    """The settings that differ: the likely reasons for the changes."""
    words = [f"{one.name} {_value(one.before)} → {_value(one.after)}" for one in found.settings[:_TOP]]
    return f'<p class="hint">Settings that differ: {escape("; ".join(words))}</p>' if words else ""


def _value(value: Any) -> str:
    text = ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)
    if type(value) is int:
        text = f"{value:,}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _allocations(found: Difference, traces: Sequence[Trace]) -> str:
    large = [one for one in found.allocations if not is_small(one.change, found)]
    return _changes_table(large[:_TOP], traces, "Allocations that changed most") if large else ""


def _changes_table(changes: Iterable[AllocationChange], traces: Sequence[Trace], label: str) -> str:
    rows = [
        [
            one.kind,
            f"{one.count:,}",
            format_change(one.change),
            f"{swatch(one.category)}{spoken(one.category)}",
            code(one.module),
            code(one.op),
            spoken(one.phase),
        ]
        for one in changes
    ]
    columns = {"category": "category", "module": "module", "operator": "op", "born in": "phase"}
    headers = ["", "number", "change", *(marked(*column, *traces) for column in columns.items())]
    return table(headers, rows, label, "allocations changes")


def _small_changes(found: Difference) -> str:
    """Categories and modules that changed by less than 0.1 % of the larger peak, folded."""
    rows = [
        [what, f"{swatch(name)}{spoken(name)}" if what == "category" else code(name), format_change(one.change)]
        for what, name, one in (*_named("category", found.categories), *_named("module", found.modules))
        if is_small(one.change, found)
    ]
    if not rows:
        return ""
    told = f"{len(rows)} {'change' if len(rows) == 1 else 'changes'} below {LEAST_SHARE:.1%} of the peak"
    listed = table(("", "name", "change"), rows, told, "small titled")
    return f'<details class="minor"><summary>{told}</summary>{listed}</details>'


def _named(what: str, changes: Mapping[str, Change]) -> list[tuple[str, str, Change]]:
    return [(what, name, one) for name, one in changes.items()]
