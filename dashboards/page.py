"""One self-contained HTML page of traces: timelines, what is alive at the peak, the effects table. Fetches nothing."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from memscope.dashboards.downsample import MOST_POSITIONS
from memscope.dashboards.palette import DARK, LIGHT, css_variables, theme_update
from memscope.dashboards.timeline import TOTAL, moment, peak_text, shown_categories, timeline, views
from memscope.errors import UsageError
from memscope.trace import PHASES, Trace
from memscope.units import format_bytes

__all__ = ["EffectRow", "EffectsTable", "PageRun", "render_page"]

_TOP_MODULES = 8
_PAGE_POSITIONS = 20_000
"""Positions shared by all timelines of a page; one takes at most some 150 bytes packed, and a page stays under 8 MB."""
_INDEX = re.compile(r"\.\d+(?=\.|$)")
# Refuses every request, whatever a script may try; plotly's "download plot as png" draws from data: and blob:.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class PageRun:
    """One section of a page."""

    label: str
    trace: Trace


@dataclass(frozen=True)
class EffectRow:
    """One row of the effects table, as plain text: its title and one cell a column."""

    title: str
    cells: Sequence[str]


@dataclass(frozen=True)
class EffectsTable:
    """What each strategy changes: the first header names the rows, the others the cells of each row.

    Raises:
        ValueError: when a row has not one cell for each header after the first.
    """

    headers: Sequence[str]
    rows: Sequence[EffectRow]
    note: str = ""
    """The comparison the table rests on, in one line."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.headers) - 1:
                raise ValueError(
                    f'row "{row.title}" of the effects table has {len(row.cells)} cells, '
                    f"its headers ask for {len(self.headers) - 1}"
                )


def render_page(runs: Sequence[PageRun], table1: EffectsTable | None = None) -> str:
    """The whole page as HTML. Every text of a trace is escaped; the page works from a file, with no network.

    Args:
        runs: at least one; each gets a section, in this order.
        table1: effects of the strategies, shown above the runs.

    Raises:
        UsageError: when there is no run, or a trace is empty.
    """
    if not runs:
        raise UsageError("a page needs at least one trace: none was given")
    targets = ", ".join(dict.fromkeys(str(run.trace.meta.get("target", "unnamed target")) for run in runs))
    title = f"memscope: {targets}"
    body = [f'<header><p class="brand">memscope</p><h1>{escape(targets)}</h1></header>', "<main>"]
    if len(runs) > 1:
        body.append(_overview(runs))
    if table1 is not None:
        body.append(_effects(table1))
    most = max(500, min(MOST_POSITIONS, _PAGE_POSITIONS // len(runs)))
    body += [_section(run, f"run{index}", most) for index, run in enumerate(runs)]
    body.append("</main>")
    return "\n".join([_head(title), "<body>", *body, _scripts(), "</body>", "</html>", ""])


def _head(title: str) -> str:
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>\n'
        f":root{{{css_variables(LIGHT)}}}\n@media (prefers-color-scheme: dark){{:root{{{css_variables(DARK)}}}}}\n"
        f"{style}</style>\n</head>"
    )


def _scripts() -> str:
    page = files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    return f"<script>{get_plotlyjs()}</script>\n<script>\n{page}</script>"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], label: str, kind: str) -> str:
    """A table of ready HTML cells, the first of each row its header. Scrolls sideways when wide, also by keyboard."""
    head = "".join(f'<th scope="col">{header}</th>' for header in headers)
    lines = "".join(
        f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>' for cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table class="{kind}">'
        f"<caption>{escape(label)}</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _overview(runs: Sequence[PageRun]) -> str:
    largest = max(run.trace.peak.allocated_bytes for run in runs) or 1
    rows = []
    for index, run in enumerate(runs):
        peak = run.trace.peak
        bar = f'<span class="bar" style="--share:{peak.allocated_bytes / largest:.4f}"></span>'
        link = f'<a href="#run{index}">{escape(run.label)}</a>'
        rows.append([link, f"{bar}{format_bytes(peak.allocated_bytes)}", moment(peak)])
    return f'<section class="card">{_table(("run", "peak", "when"), rows, "Peak of each run", "overview")}</section>'


def _effects(table: EffectsTable) -> str:
    rows = [[escape(cell) for cell in (row.title, *row.cells)] for row in table.rows]
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    shown = _table([escape(header) for header in table.headers], rows, "What each strategy changes", "effects")
    return f'<section class="card">{shown}{note}</section>'


def _section(run: PageRun, key: str, most: int) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(run.trace))
    return (
        f'<section class="card" id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(run.label)}</h2>'
        f'<dl class="facts">{facts}</dl>{_figure(run, key, most)}'
        f'<div class="tables">{_breakdown(run.trace)}{_modules(run.trace)}</div></section>'
    )


def _facts(trace: Trace) -> list[tuple[str, str]]:
    """What a reader must know of a run; what its metadata does not say is left out."""
    meta, peak = trace.meta, trace.peak
    facts = [("peak", format_bytes(peak.allocated_bytes)), ("reached in", _when(trace))]
    if "target" in meta:
        facts.append(("target", str(meta["target"])))
    strategies = meta.get("strategies")
    if isinstance(strategies, Sequence):
        named = [strategies] if isinstance(strategies, str) else strategies
        facts.append(("strategies", ", ".join(map(str, named)) or "none"))
    match meta.get("device"):
        case {"name": name, "simulated": bool(simulated)}:
            facts.append(("device", f"{name} ({'simulated' if simulated else 'measured'})"))
        case {"name": name} | str(name):
            facts.append(("device", str(name)))
    match meta.get("parameters"):
        case {"total": int(total), "trainable": int(trainable)}:
            facts.append(("parameters", f"{total:,}, trainable {trainable:,} ({trainable / max(total, 1):.2%})"))
    match meta.get("versions"):
        case {"torch": version}:
            facts.append(("torch", str(version)))
    return facts


def _when(trace: Trace) -> str:
    peak = trace.peak
    within = f" · micro-batch {peak.micro_batch}" if peak.step >= 0 else ""
    return f"{moment(peak)}{within} · event {peak.event:,} of {trace.events:,}"


def _figure(run: PageRun, key: str, most: int) -> str:
    figure = timeline(run.trace, most_positions=most)
    names = [curve.name for curve in figure.data]
    # The page has its own legend and zoom buttons, which a keyboard reaches and a phone has room for.
    figure.update_layout(showlegend=False, margin_t=28)
    figure.layout.updatemenus = None
    zooms = "".join(
        f'<button type="button" data-range="{view.first},{view.last}" aria-pressed="{"false" if index else "true"}">'
        f"{escape(view.label)}</button>"
        for index, view in enumerate(views(run.trace))
    )
    curves = [*shown_categories(run.trace), TOTAL]
    toggles = "".join(
        f'<button type="button" data-curve="{names.index(name)}" aria-pressed="true">{_swatch(name)}{name}</button>'
        for name in curves
    )
    phases = "".join(f"<li>{_swatch(name)}{name}</li>" for name in names if name in PHASES)
    label = escape(f"Memory timeline of {run.label}: {peak_text(run.trace)}. Arrow keys move along the events.")
    return (
        f'<div class="controls" role="group" aria-label="zoom">{zooms}</div>'
        f'<div class="figure" id="{key}-figure" role="application" aria-roledescription="chart" aria-label="{label}" '
        f'tabindex="0" data-figure="{_packed(figure)}"><noscript>The timeline is drawn by JavaScript, which is off; '
        f"the tables below say what is allocated at the peak.</noscript></div>"
        f'<p class="readout" aria-live="polite"></p>'
        f'<div class="controls legend" role="group" aria-label="categories shown">{toggles}</div>'
        f'<ul class="phases" aria-label="phases, the bar under the plot">{phases}</ul>'
    )


def _packed(figure: go.Figure) -> str:
    """The figure and the colours of its themes as JSON, deflated, in base64: much smaller, and free of markup."""
    names = [curve.name for curve in figure.data]
    themes: dict[str, Any] = {"light": theme_update(names, LIGHT), "dark": theme_update(names, DARK)}
    text = f'{{"figure":{figure.to_json()},"themes":{json.dumps(themes)}}}'
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _swatch(name: str) -> str:
    return f'<span class="swatch" style="--swatch:var(--{name if name != TOTAL else "text"})"></span>'


def _breakdown(trace: Trace) -> str:
    total = trace.peak.allocated_bytes or 1
    sizes = trace.by_category()
    rows = [
        [f"{_swatch(name)}{name}", format_bytes(sizes[name]), f"{sizes[name] / total:.1%}", f"{sizes[name]:,}"]
        for name in reversed(shown_categories(trace))
    ]
    rows.append(["allocated", format_bytes(trace.peak.allocated_bytes), "100.0%", f"{trace.peak.allocated_bytes:,}"])
    return _table(("category", "size", "share", "bytes"), rows, "Alive at the peak, by category", "numbers summed")


def _modules(trace: Trace) -> str:
    """The modules that hold most at the peak. Names that differ by a layer's number only are counted together."""
    total = trace.peak.allocated_bytes or 1
    sizes: dict[str, int] = {}
    for name, size in trace.by("module").items():
        alike = _INDEX.sub(".*", name)
        sizes[alike] = sizes.get(alike, 0) + size
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:_TOP_MODULES]
    rows = [[f"<code>{escape(name)}</code>", format_bytes(size), f"{size / total:.1%}"] for name, size in largest]
    label = "Alive at the peak, by module (* stands for every layer)"
    return _table(("module", "size", "share"), rows, label, "numbers")


if __name__ == "__main__":
    from memscope.dashboards.demo import write_page

    write_page(sys.argv[1:])
