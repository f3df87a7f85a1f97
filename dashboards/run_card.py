"""One run on a page: its facts, its timeline, the allocations alive at a moment, its ledger and its allocator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np

from memscope.analysis.alive import by_module_together, largest, occasion
from memscope.analysis.chosen import strategies_of
from memscope.analysis.effects import Run
from memscope.analysis.fit import fit_of
from memscope.analysis.host import about_host, host_peak
from memscope.analysis.inferred import marked
from memscope.analysis.ledger import Ledger, ledger
from memscope.analysis.notes import notes_of
from memscope.analysis.ran_out import about_fragments, ran_out
from memscope.dashboards.allocator import look
from memscope.dashboards.allocator_card import allocator_part
from memscope.dashboards.course_card import phases_part, steps_part
from memscope.dashboards.detail import curve_data, events_to_hold
from memscope.dashboards.head import device_of, how_made
from memscope.dashboards.html import Section, card, code, facts, fold, packed, swatch, table
from memscope.dashboards.moments import page_data
from memscope.dashboards.names import spoken
from memscope.dashboards.sketch import sketch
from memscope.dashboards.timeline import (
    RESERVED,
    TOTAL,
    events_to_show,
    moment,
    peak_text,
    shown_categories,
    timeline,
    unit_of,
    views,
)
from memscope.trace import PHASES, Trace
from memscope.units import format_bytes, format_change

__all__ = ["Room", "run_section"]

_TOP_MODULES = 8
_TOP_ALLOCATIONS = 15
_GROUP = 'role="group" aria-label='


@dataclass(frozen=True)
class Room:
    """How much of one run a page may hold."""

    positions: int
    """Events that the timeline shows at once."""
    held: int
    """Further events, for zooming in."""
    allocations: int


def run_section(run: Run, key: str, room: Room, *, opened: bool) -> Section:
    """The section of one run.

    Args:
        run: the run.
        key: id of the section on the page.
        room: how much of the run the page may hold.
        opened: whether the allocations alive at the peak are unfolded at first.

    Raises:
        UsageError: when the trace is empty.
    """
    trace = run.trace
    parts = [("alive", "Alive at the peak")]
    body = [
        facts(_facts(trace)),
        *(f'<p class="warning">{escape(note)}</p>' for note in _notes(trace)),
        _timeline(run, room.positions),
        _alive(trace, key, room, opened=opened),
    ]
    for name, title, part in (("phases", "Phases", phases_part), ("steps", "Steps", steps_part)):
        if html := part(trace, f"{key}-{name}"):
            parts.append((name, title))
            body.append(html)
    if found := ledger(trace):
        parts.append(("ledger", "Ledger"))
        body.append(_ledger(found, f"{key}-ledger"))
    if view := look(trace):
        parts.append(("allocator", "Allocator"))
        body.append(allocator_part(trace, view, f"{key}-allocator"))
    return Section(
        key=key,
        title=run.label,
        html=card("".join(body), key=key, title=run.label),
        note=format_bytes(trace.peak.allocated_bytes),
        parts=tuple((f"{key}-{name}", title) for name, title in parts),
    )


def _facts(trace: Trace) -> Iterator[tuple[str, str]]:
    """The facts of one run; the head of the page has those that runs share."""
    meta, peak = trace.meta, trace.peak
    within = f" · micro-batch {peak.micro_batch}" if peak.step >= 0 else ""
    yield "peak", format_bytes(peak.allocated_bytes)
    yield "reached in", f"{moment(peak)}{within} · event {peak.event:,} of {trace.events:,}"
    strategies = strategies_of(trace)
    if strategies is not None:
        yield "strategies", ", ".join(strategies) or "none"
    if device := device_of(trace):
        how = how_made(trace)
        yield "device", f"{device} ({how})" if how else device
    match meta.get("parameters"):
        case {"total": int(total), "trainable": int(trainable)}:
            yield "trainable parameters", f"{trainable:,} of {total:,} ({trainable / max(total, 1):.2%})"
    if (fit := fit_of(trace)) is not None and fit.fits:
        yield "fit", str(fit)
    if (host := host_peak(trace)) is not None:
        yield "host memory", about_host(host)
    yield "allocations", f"{len(trace):,}"


def _notes(trace: Trace) -> Iterator[str]:
    """Everything inexact about the trace, and everything that went wrong in the run."""
    if trace.meta.get("out_of_memory"):
        yield f"Does not fit: {ran_out(trace)}."
        yield from (f"When it ran out of memory, {text}." for text in about_fragments(trace))
    yield from notes_of(trace)
    match trace.meta.get("imported"):
        case {"notes": [*notes]}:
            yield from (f"Not exact: {note}." for note in notes)


def _timeline(run: Run, most_positions: int) -> str:
    figure = timeline(run.trace, most_positions=most_positions)
    names = [curve.name for curve in figure.data]
    # The page has its own legend, zoom buttons and hover box: a keyboard reaches them, and a phone has room for them.
    figure.update_layout(showlegend=False, margin_t=28, height=None, hovermode="x")
    figure.layout.updatemenus = None
    for curve in figure.data:
        if curve.hoverinfo != "skip":
            curve.update(hoverinfo="none", hovertemplate=None)
        if curve.name != TOTAL:
            curve.customdata = None
    zooms = "".join(
        f'<button type="button" data-range="{view.first},{view.last}" aria-pressed="{"false" if index else "true"}">'
        f"{escape(view.label)}</button>"
        for index, view in enumerate(views(run.trace))
    )
    toggles = "".join(
        f'<button type="button" data-curve="{names.index(spoken(name))}" aria-pressed="true">{_swatch(name)}'
        f"{spoken(name)}</button>"
        for name in (*shown_categories(run.trace), TOTAL, RESERVED)
        if spoken(name) in names
    )
    phases = "".join(f"<li>{swatch(name)}{spoken(name)}</li>" for name in PHASES if spoken(name) in names)
    label = escape(
        f"Memory timeline of {run.label}: {peak_text(run.trace)}. Arrow keys move along the events; Enter shows the "
        "allocations alive there."
    )
    return (
        f'<div class="controls zooms" {_GROUP}"zoom">{zooms}</div>'
        f'<div class="figure timeline" role="application" aria-roledescription="chart" aria-label="{label}" '
        f'tabindex="0" data-figure="{packed(figure.to_json())}">{sketch(run.trace)}</div>'
        '<noscript><p class="note">JavaScript is off: the timeline is a still picture, and the tables show the peak.'
        "</p></noscript>"
        '<p class="readout" aria-live="polite"></p>'
        f'<div class="controls legend" {_GROUP}"categories shown">{toggles}</div>'
        f'<ul class="phases" aria-label="phases, the bar under the plot">{phases}</ul>'
        f'<p class="hint resolution" aria-live="polite">{_resolution(run.trace, most_positions)}</p>'
    )


def _resolution(trace: Trace, most_positions: int) -> str:
    """How much of the run its timeline shows, worded as in curves.js."""
    shown = len(events_to_show(trace, most_positions))
    if shown == trace.events:
        return f"All {shown:,} events in view are shown."
    return (
        f"{shown:,} of {trace.events:,} events in view are shown, the highest and lowest of each stretch; zoom in for "
        "more."
    )


def _swatch(name: str) -> str:
    return swatch({TOTAL: "text", RESERVED: "muted"}.get(name, name))


def _alive(trace: Trace, key: str, room: Room, *, opened: bool) -> str:
    """The allocations alive: those at the peak are written here; moment.js shows those of any other moment."""
    shown = events_to_show(trace, room.positions)
    held = events_to_hold(trace, shown, room.held)
    data = page_data(trace, held, room.allocations) | curve_data(trace, held)
    data |= {"atFirst": np.searchsorted(held, shown).tolist(), "scale": unit_of(trace.peak.allocated_bytes)[1]}
    peak = trace.peak
    when = spoken(occasion(peak.step, peak.phase, peak.micro_batch))
    body = (
        '<p class="hint">Click the timeline to see another moment, a category to hide it, an area or a module to list '
        "its allocations.</p>"
        f'<div class="controls" {_GROUP}"moment and grouping"><button type="button" data-show="peak" '
        'aria-pressed="true">peak</button><button type="button" data-show="together" aria-pressed="true">layers '
        "together</button></div>"
        '<div class="figure areas" role="img" aria-label="The allocations alive, as areas: modules, in them operators '
        'and categories. The list below has the same content."></div>'
        '<details class="tree"><summary>The areas as a list</summary><ul></ul></details>'
        f'<div class="tables">{_categories(trace)}{_modules(trace)}</div>{_allocations(trace)}'
        '<p class="note rest" hidden></p>'
    )
    return fold(
        body,
        key=f"{key}-alive",
        title="Alive at the peak",
        gist=f"{format_bytes(peak.allocated_bytes)} · {when} · event {peak.event:,}",
        opened=opened,
        more=f' data-moment="{packed(json.dumps(data))}"',
    )


def _categories(trace: Trace) -> str:
    total = trace.peak.allocated_bytes or 1
    sizes = trace.by_category()
    rows = [
        [f"{swatch(name)}{spoken(name)}", format_bytes(sizes[name]), f"{sizes[name] / total:.1%}", f"{sizes[name]:,}"]
        for name in reversed(shown_categories(trace))
    ]
    rows.append(["allocated", format_bytes(trace.peak.allocated_bytes), "100.0%", f"{trace.peak.allocated_bytes:,}"])
    return table(
        ("category", "size", "share", "bytes"),
        rows,
        marked("By category", "category", trace),
        "numbers summed categories",
    )


def _modules(trace: Trace) -> str:
    """The modules with the most bytes at the peak. Names that differ only by the number of a layer count together."""
    total = trace.peak.allocated_bytes or 1
    sizes = list(by_module_together(trace).items())[:_TOP_MODULES]
    rows = [
        [code(name or "(no module)"), format_bytes(size_bytes), f"{size_bytes / total:.1%}"]
        for name, size_bytes in sizes
    ]
    label = f"{marked('By module', 'module', trace)}, * stands for every layer"
    return table(("module", "size", "share"), rows, label, "numbers modules")


def _allocations(trace: Trace) -> str:
    rows = [
        [
            format_bytes(one.size_bytes),
            f"{swatch(one.category)}{spoken(one.category)}",
            code(one.module),
            code(one.op),
            spoken(one.born_in),
            spoken(one.freed_in) or "the end",
            one.life,
        ]
        for one in largest(trace, _TOP_ALLOCATIONS)
    ]
    columns = {"category": "category", "module": "module", "operator": "op", "born in": "phase"}
    headers = ["size", *(marked(*column, trace) for column in columns.items()), "lives until", "events"]
    alive = len(trace.at(trace.peak.event))
    return table(headers, rows, f"Largest allocations ({len(rows)} of {alive:,})", "allocations")


def _ledger(found: Ledger, key: str) -> str:
    rows = [
        [f"{line.name} (estimate)" if line.estimate else line.name, format_change(line.added),
         format_bytes(line.total), f"{line.total:,}", escape(line.seen_in)]
        for line in found.lines
    ]  # fmt: skip
    note = f'<p class="note">{escape(found.note)}</p>' if found.note else ""
    listed = table(("", "added", "total", "bytes", "seen in"), rows, "The same memory in other tools", "numbers ledger")
    gist = ", ".join(f"{line.name} {format_bytes(line.total)}" for line in found.lines[1:])
    return fold(listed + note, key=key, title="Ledger", gist=gist)
