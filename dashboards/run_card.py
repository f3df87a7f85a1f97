"""One run on a page: its facts, its timeline, what is alive at a moment, its ledger and its allocator."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from memscope.allocator.view import AllocatorView
from memscope.analysis.alive import by_module_together, largest, occasion
from memscope.analysis.effects import Run
from memscope.analysis.inferred import how_inferred, marked
from memscope.analysis.ledger import ledger
from memscope.analysis.ran_out import ran_out
from memscope.analysis.skipped import how_skipped
from memscope.dashboards.allocator import fragmentation, look, segments
from memscope.dashboards.detail import curve_data, events_to_hold
from memscope.dashboards.html import card, facts, figure_box, packed, swatch, table
from memscope.dashboards.moments import page_data
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

__all__ = ["run_card"]

_TOP_MODULES = 8
_TOP_ALLOCATIONS = 15
_TOP_SIZES = 12
"""Kinds of segments listed."""
_HOLD = 'role="group" aria-label='


def run_card(run: Run, key: str, most_positions: int, most_held: int, most_kept: int) -> str:
    """The section of one run.

    Args:
        run: what to show.
        key: id of the section on the page.
        most_positions: events its timeline may show at once.
        most_held: events the page may hold beside them, for a reader who zooms in.
        most_kept: allocations the page may hold of it.

    Raises:
        UsageError: when the trace is empty.
    """
    trace = run.trace
    body = [
        facts(_facts(trace)),
        *(f'<p class="warning">{escape(note)}</p>' for note in _notes(trace)),
        _timeline(run, most_positions),
        _moment(trace, most_positions, most_held, most_kept),
        _ledger(trace),
        _allocator(trace),
    ]
    return card("".join(body), key=key, title=run.label)


def _facts(trace: Trace) -> Iterator[tuple[str, str]]:
    """What a reader must know of a run; what its metadata does not say is left out."""
    meta, peak = trace.meta, trace.peak
    within = f" · micro-batch {peak.micro_batch}" if peak.step >= 0 else ""
    yield "peak", format_bytes(peak.allocated_bytes)
    yield "reached in", f"{moment(peak)}{within} · event {peak.event:,} of {trace.events:,}"
    if "target" in meta:
        yield "target", str(meta["target"])
    strategies = meta.get("strategies")
    if isinstance(strategies, Sequence):
        named = [strategies] if isinstance(strategies, str) else strategies
        yield "strategies", ", ".join(map(str, named)) or "none"
    match meta.get("device"):
        case {"name": name, "simulated": bool(simulated)}:
            yield "device", f"{name} ({'simulated' if simulated else 'measured'})"
        case {"name": name} | str(name):
            yield "device", str(name)
    match meta.get("capacity"):
        case int(capacity):
            yield "capacity", format_bytes(capacity)
    match meta.get("parameters"):
        case {"total": int(total), "trainable": int(trainable)}:
            yield "parameters", f"{total:,}, trainable {trainable:,} ({trainable / max(total, 1):.2%})"
    match meta.get("versions"):
        case {"torch": version}:
            yield "torch", str(version)
    yield "allocations", f"{len(trace):,}"


def _notes(trace: Trace) -> Iterator[str]:
    """What is not exact about the trace, or went wrong in the run."""
    if trace.meta.get("out_of_memory"):
        yield f"Does not fit: {ran_out(trace)}."
    for how in filter(None, (how_inferred(trace), how_skipped(trace))):
        yield f"{how}."
    match trace.meta.get("imported"):
        case {"notes": [*notes]}:
            yield from (f"Not exact: {note}." for note in notes)


def _timeline(run: Run, most_positions: int) -> str:
    figure = timeline(run.trace, most_positions=most_positions)
    names = [curve.name for curve in figure.data]
    # The page has its own legend and zoom buttons, which a keyboard reaches and a phone has room for.
    figure.update_layout(showlegend=False, margin_t=28, height=None)
    figure.layout.updatemenus = None
    zooms = "".join(
        f'<button type="button" data-range="{view.first},{view.last}" aria-pressed="{"false" if index else "true"}">'
        f"{escape(view.label)}</button>"
        for index, view in enumerate(views(run.trace))
    )
    curves = [name for name in (*shown_categories(run.trace), TOTAL, RESERVED) if name in names]
    toggles = "".join(
        f'<button type="button" data-curve="{names.index(name)}" aria-pressed="true">{_swatch(name)}{name}</button>'
        for name in curves
    )
    phases = "".join(f"<li>{swatch(name)}{name}</li>" for name in names if name in PHASES)
    label = escape(
        f"Memory timeline of {run.label}: {peak_text(run.trace)}. Arrow keys move along the events, Enter shows what "
        "is alive there."
    )
    return (
        f'<div class="controls" {_HOLD}"zoom">{zooms}</div>'
        f'<div class="figure timeline" role="application" aria-roledescription="chart" aria-label="{label}" '
        f'tabindex="0" data-figure="{packed(figure.to_json())}">{sketch(run.trace)}</div>'
        '<noscript><p class="note">JavaScript is off: the timeline is a still picture, the tables are of the peak.</p>'
        "</noscript>"
        f'<p class="readout" aria-live="polite"></p>'
        f'<p class="hint resolution" aria-live="polite">{_resolution(run.trace, most_positions)}</p>'
        f'<div class="controls legend" {_HOLD}"categories shown">{toggles}</div>'
        f'<ul class="phases" aria-label="phases, the bar under the plot">{phases}</ul>'
    )


def _resolution(trace: Trace, most_positions: int) -> str:
    """How much of the run its timeline shows; as curves.js says it of any view."""
    shown = len(events_to_show(trace, most_positions))
    if shown == trace.events:
        return f"All {shown:,} events in view are shown."
    return (
        f"{shown:,} of {trace.events:,} events in view are shown, the highest and lowest of each stretch; zoom in for "
        "more."
    )


def _swatch(name: str) -> str:
    return swatch({TOTAL: "text", RESERVED: "muted"}.get(name, name))


def _moment(trace: Trace, most_positions: int, most_held: int, most_kept: int) -> str:
    """What is alive: at the peak, as it is written here; elsewhere, once moment.js has been asked."""
    shown = events_to_show(trace, most_positions)
    held = events_to_hold(trace, shown, most_held)
    data = page_data(trace, held, most_kept) | curve_data(trace, held)
    data |= {"atFirst": np.searchsorted(held, shown).tolist(), "scale": unit_of(trace.peak.allocated_bytes)[1]}
    peak = trace.peak
    return (
        f'<section class="moment" aria-label="what is alive" data-moment="{packed(json.dumps(data))}">'
        f'<h3 aria-live="polite">Alive at the peak: <span class="what">{format_bytes(peak.allocated_bytes)} · '
        f"{occasion(peak.step, peak.phase, peak.micro_batch)} · event {peak.event:,}</span></h3>"
        '<p class="hint">Click the timeline to see another moment, a category to leave it out, an area or module to '
        "list what is in it.</p>"
        f'<div class="controls" {_HOLD}"what is shown"><button type="button" data-show="peak" aria-pressed="true">'
        'peak</button><button type="button" data-show="together" aria-pressed="true">layers together</button></div>'
        '<div class="figure areas" role="img" aria-label="What is alive, as areas: modules, in them operators and '
        'categories. The list below says the same."></div>'
        '<details class="tree"><summary>The areas as a list</summary><ul></ul></details>'
        f'<div class="tables">{_categories(trace)}{_modules(trace)}</div>{_allocations(trace)}'
        '<p class="note rest" hidden></p></section>'
    )


def _categories(trace: Trace) -> str:
    total = trace.peak.allocated_bytes or 1
    sizes = trace.by_category()
    rows = [
        [f"{swatch(name)}{name}", format_bytes(sizes[name]), f"{sizes[name] / total:.1%}", f"{sizes[name]:,}"]
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
    """The modules that hold most at the peak. Names that differ by a layer's number only are counted together."""
    total = trace.peak.allocated_bytes or 1
    sizes = list(by_module_together(trace).items())[:_TOP_MODULES]
    rows = [
        [f"<code>{escape(name or '(no module)')}</code>", format_bytes(size), f"{size / total:.1%}"]
        for name, size in sizes
    ]
    label = f"{marked('By module', 'module', trace)}, * stands for every layer"
    return table(("module", "size", "share"), rows, label, "numbers modules")


def _allocations(trace: Trace) -> str:
    rows = [
        [
            format_bytes(one.size_bytes),
            f"{swatch(one.category)}{one.category}",
            f"<code>{escape(one.module)}</code>",
            f"<code>{escape(one.op)}</code>",
            one.born_in,
            one.freed_in or "the end",
            one.life,
        ]
        for one in largest(trace, _TOP_ALLOCATIONS)
    ]
    columns = {"category": "category", "module": "module", "operator": "op", "born in": "phase"}
    headers = ["size", *(marked(*column, trace) for column in columns.items()), "lives until", "events"]
    alive = len(trace.at(trace.peak.event))
    return table(headers, rows, f"Largest allocations ({len(rows)} of {alive:,})", "allocations")


def _ledger(trace: Trace) -> str:
    found = ledger(trace)
    if found is None:
        return ""
    rows = [
        [f"{line.name} (estimate)" if line.estimate else line.name, format_change(line.added),
         format_bytes(line.total), f"{line.total:,}", escape(line.seen_in)]
        for line in found.lines
    ]  # fmt: skip
    note = f'<p class="note">{escape(found.note)}</p>' if found.note else ""
    headers = ("", "added", "total", "bytes", "seen in")
    return table(headers, rows, "Ledger: what other tools show", "numbers ledger") + note


def _allocator(trace: Trace) -> str:
    view = look(trace)
    if view is None:
        return ""
    parts = [f'<section class="allocator" aria-label="allocator"><h3>Allocator</h3><p>{_unused(trace, view)}</p>']
    parts.append(
        figure_box(fragmentation(trace, view=view), "What the allocator holds and nobody asked for, over time")
    )
    if view.peak is None:
        parts.append(f'<p class="note">{escape(view.unknown)}</p>')
    else:
        label = "Segments with the most free bytes that cannot be given back, at the peak: their blocks by address"
        parts.append(f"<h4>{label}</h4>{figure_box(segments(trace, view=view), label)}{_kinds(view)}")
    return "".join([*parts, "</section>"])


def _unused(trace: Trace, view: AllocatorView) -> str:
    """What of the reserved memory could not be used at the peak, in a sentence."""
    at = int(view.events.searchsorted(trace.peak.event))
    reserved, cached, rounding = int(view.reserved[at]), int(view.cached[at]), int(view.rounding[at])
    text = (
        f"At the peak {format_bytes(cached)} of {format_bytes(reserved)} reserved are not allocated, and blocks are "
        f"{format_bytes(rounding)} larger than what was asked for."
    )
    if view.unreleasable is None or view.largest_free is None:
        return text
    stuck, hole = int(view.unreleasable[at]), int(view.largest_free[at])
    return (
        f"{text} {format_bytes(cached - stuck)} could be given back; {format_bytes(stuck)} could not, as they share "
        f"their segments with what is alive. The largest free block has {format_bytes(hole)}: more than that asks for "
        "a new segment."
    )


def _kinds(view: AllocatorView) -> str:
    """The segments at the peak, counted by pool and size."""
    assert view.peak is not None, "asked for only where segments are known"
    sums: dict[tuple[str, int], list[int]] = {}
    for segment in view.peak.snapshot.segments:
        free = sum(block.size_bytes for block in segment.blocks if not block.allocated)
        found = sums.setdefault((segment.pool, segment.size_bytes), [0, 0, 0, 0])
        for place, value in enumerate((1, segment.size_bytes, len(segment.blocks), free)):
            found[place] += value
    largest_first = sorted(sums.items(), key=lambda item: -item[1][1])
    rows = [
        [f"{pool} pool, {format_bytes(size)}", f"{count:,}", format_bytes(total), f"{blocks:,}", format_bytes(free)]
        for (pool, size), (count, total, blocks, free) in largest_first[:_TOP_SIZES]
    ]
    left = largest_first[_TOP_SIZES:]
    if left:
        count, total, blocks, free = (sum(counts[place] for _, counts in left) for place in range(4))
        rows.append(["others", f"{count:,}", format_bytes(total), f"{blocks:,}", format_bytes(free)])
    headers = ("segments of", "number", "reserved", "blocks", "free")
    return table(headers, rows, "Segments at the peak", "numbers")
