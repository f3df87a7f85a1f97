"""Several runs on a page: their peaks, what each strategy changes, prediction against measurement, differences."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from memscope.analysis.agreement import agreements
from memscope.analysis.diff import Difference, diff
from memscope.analysis.effects import ROWS, TITLES, Run, Table1
from memscope.analysis.inferred import how_inferred, marked
from memscope.analysis.ledger import ledger
from memscope.dashboards.comparison import difference, small_multiples
from memscope.dashboards.html import card, figure_box, swatch, table
from memscope.dashboards.timeline import moment
from memscope.trace import Trace
from memscope.units import format_bytes, format_change

__all__ = ["comparison_cards", "effects_card"]

_TOP = 8
"""Settings, and kinds of allocations, that are listed of a difference."""
_LONGEST_VALUE = 60


def comparison_cards(runs: Sequence[Run]) -> list[str]:
    """The cards of several runs; the first run is what the others are compared with."""
    return [_overview(runs), *_agreement(runs), _differences(runs)]


def effects_card(table1: Table1, baselines: Sequence[str]) -> str:
    """Table 1 with the comparison it rests on, and why an arrow is not what is usually said."""
    rows = [[TITLES[row], *(escape(str(column[row])) for column in table1.columns)] for row in ROWS]
    headers = ["", *(escape(column.label) for column in table1.columns)]
    rests_on = [f"Each column: {table1.columns[0].comparison}", *(f"Baseline: {text}" for text in baselines)]
    notes = [
        f"{column.label}, {TITLES[effect.row]}: {effect.note}"
        for column in table1.columns
        for effect in column.effects
        if effect.note
    ]
    shown = table(headers, rows, "Table 1: what each strategy changes", "effects")
    return card(shown + "".join(f'<p class="note">{escape(text)}</p>' for text in [". ".join(rests_on), *notes]))


def _overview(runs: Sequence[Run]) -> str:
    highest = max(run.trace.peak.allocated_bytes for run in runs) or 1
    rows = []
    for index, run in enumerate(runs):
        peak, found = run.trace.peak, ledger(run.trace)
        bar = f'<span class="bar" style="--share:{peak.allocated_bytes / highest:.4f}"></span>'
        link = f'<a href="#run{index}">{escape(run.label)}</a>'
        reserved = found.total("reserved") if found else None
        cell = "" if reserved is None else format_bytes(reserved)
        rows.append([link, f"{bar}{format_bytes(peak.allocated_bytes)}", cell, moment(peak)])
    listed = table(("run", "allocated at the peak", "reserved at most", "when"), rows, "Peak of each run", "overview")
    label = "Memory over time of every run, on the same axes; the table above has their peaks"
    return card(f"{listed}{figure_box(small_multiples(runs), label)}", key="runs", title="All runs on the same axes")


def _agreement(runs: Sequence[Run]) -> list[str]:
    cards = []
    for number, found in enumerate(agreements(runs)):
        rows = [
            [escape(one.name), format_bytes(one.predicted), format_bytes(one.measured),
             format_change(one.predicted - one.measured), str(one)]
            for one in found.figures
        ]  # fmt: skip
        headers = ("", "predicted", "measured", "difference", "of measured")
        label = f"{found.predicted} (simulated) against {found.measured} (measured), each at its own peak"
        cards.append(
            card(
                table(headers, rows, label, "numbers"),
                key=f"agreement{number}",
                title="Predicted against measured",
            )
        )
    return cards


def _differences(runs: Sequence[Run]) -> str:
    first, *others = runs
    parts = []
    for run in others:
        found = diff(first.trace, run.trace)
        label = f"{run.label} against {first.label}: {format_change(found.peak.change)}, each at its own peak"
        how = "".join(
            f'<p class="note">{escape(f"{one.label}: {told}.")}</p>'
            for one in (first, run)
            if (told := how_inferred(one.trace))
        )
        parts.append(f"<h3>{escape(label)}</h3>{_settings(found)}{how}")
        if found:
            parts.append(figure_box(difference(first.trace, run.trace, found=found), label))
            parts.append(_allocations(found, (first.trace, run.trace)))
    return card("".join(parts), key="differences", title="What grew and what shrank")


def _settings(found: Difference) -> str:
    """What was set otherwise, which is the reason as far as it is known."""
    words = [f"{one.name} {_value(one.before)} → {_value(one.after)}" for one in found.settings[:_TOP]]
    return f'<p class="hint">Set otherwise: {escape("; ".join(words))}</p>' if words else ""


def _value(value: Any) -> str:
    text = ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _allocations(found: Difference, traces: Sequence[Trace]) -> str:
    rows = [
        [
            one.kind,
            f"{one.count:,}",
            format_change(one.change),
            f"{swatch(one.category)}{one.category}",
            f"<code>{escape(one.module)}</code>",
            f"<code>{escape(one.op)}</code>",
            one.phase,
        ]
        for one in found.allocations[:_TOP]
    ]
    columns = {"category": "category", "module": "module", "operator": "op", "born in": "phase"}
    headers = ["", "number", "change", *(marked(*column, *traces) for column in columns.items())]
    return table(headers, rows, "Allocations that changed most", "allocations changes")
