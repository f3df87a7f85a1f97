"""Reserved memory that no tensor requested: over time, and segment by segment at the peak."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from memscope.allocator.report import Segment
from memscope.allocator.view import SAMPLES, AllocatorView, allocator_view
from memscope.dashboards.downsample import shown_events
from memscope.dashboards.names import spoken
from memscope.dashboards.palette import LIGHT, Theme, Unused, dressed, themed
from memscope.dashboards.timeline import unit_of
from memscope.errors import UsageError
from memscope.trace import CATEGORIES, Ints, Trace
from memscope.units import format_bytes

__all__ = ["SHOWN_SEGMENTS", "fragmentation", "look", "segments"]

SHOWN_SEGMENTS = 16
"""The most segments that are drawn: those with the most free bytes that cannot be released."""
_FREE = "cached"
_ROW_HEIGHT = 19


def look(trace: Trace) -> AllocatorView | None:
    """The state of the allocator at the extremes of its cached memory; None for a run on the CPU."""
    if not trace.reserved.size:
        return None
    return allocator_view(trace, shown_events(trace.reserved - trace.allocated, np.zeros(0, dtype=np.int64), SAMPLES))


def fragmentation(trace: Trace, theme: Theme = LIGHT, *, view: AllocatorView | None = None) -> go.Figure:
    """Reserved bytes that no tensor requested, over time: the rounding of blocks, and cached memory.

    For a simulated run, cached memory is split into the bytes that the allocator would release before it runs out of
    memory, and those it cannot release because their segment holds an allocated block. The line is the largest cached
    block.

    Args:
        trace: a run on a device with an allocator.
        theme: colours.
        view: the result of `look` for the trace, if it is known already.

    Raises:
        UsageError: when the run had no allocator.
    """
    view = _required(view or look(trace))
    areas: dict[Unused, Ints]
    if view.unreleasable is None:
        areas = {"block rounding": view.rounding, "cached, releasable": view.cached}
    else:
        areas = {
            "block rounding": view.rounding,
            "cached, not releasable": view.unreleasable,
            "cached, releasable": view.cached - view.unreleasable,
        }
    top = int(sum(areas.values(), np.zeros_like(view.events)).max(initial=0))
    unit, scale = unit_of(top)
    figure = go.Figure()
    for name, sizes in areas.items():
        label = _FREE if view.unreleasable is None and name != "block rounding" else name
        figure.add_trace(_area(label, view.events, sizes, scale, LIGHT.unused[name]))
    if view.largest_free is not None:
        figure.add_trace(_line("largest free block", view.events, view.largest_free, scale))
    figure.update_layout(
        dressed(
            height=320,
            margin={"l": 56, "r": 12, "t": 34, "b": 44},
            hovermode="x unified",
            xaxis={
                "range": [0, trace.events],
                "title": {"text": "event", "standoff": 6},
                "hoverformat": ",d",
                "nticks": 7,
            },
            yaxis={"title": {"text": unit, "standoff": 4}, "range": [0, max(top, 1) * 1.08 / scale]},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        )
    )
    return themed(figure, theme)


def segments(trace: Trace, theme: Theme = LIGHT, *, view: AllocatorView | None = None) -> go.Figure:
    """The segments with the most free bytes that cannot be released at the peak, each as a bar of its blocks.

    Blocks are in order of address.

    Args:
        trace: a simulated run.
        theme: colours.
        view: the result of `look` for the trace, if it is known already.

    Raises:
        UsageError: when the run had no allocator, or its segments are not known.
    """
    view = _required(view or look(trace))
    if view.peak is None:
        raise UsageError(f"the segments of {trace.meta.get('target', 'this run')} cannot be drawn: {view.unknown}")
    chosen = _least_usable(view.peak.snapshot.segments)
    unit, scale = unit_of(max((segment.size_bytes for segment in chosen), default=0))
    pieces = [piece for row, one in enumerate(chosen) for piece in _pieces(row, one, trace, view.peak.owners)]
    figure = go.Figure()
    for kind, colour in (*_category_colours(), (_FREE, "")):
        alike = [piece for piece in pieces if piece.kind == kind]
        if alike:
            figure.add_trace(_bars(kind, alike, scale, colour))
    figure.update_layout(
        dressed(
            height=110 + _ROW_HEIGHT * len(chosen),
            margin={"l": 160, "r": 12, "t": 34, "b": 44},
            barmode="overlay",
            bargap=0.25,
            xaxis={"title": {"text": unit, "standoff": 6}},
            yaxis={
                "autorange": "reversed", "tickvals": list(range(len(chosen))), "showgrid": False,
                "ticktext": [f"{format_bytes(s.size_bytes)}, {format_bytes(_free(s))} free" for s in chosen],
            },
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        )
    )  # fmt: skip
    return themed(figure, theme)


def _required(view: AllocatorView | None) -> AllocatorView:
    if view is None:
        raise UsageError("this run had no allocator: it ran on the CPU")
    return view


def _area(name: str, events: Ints, size_bytes: Ints, scale: int, colour: str) -> go.Scatter:
    return go.Scatter(
        name=name, x=events, y=size_bytes / scale, customdata=[format_bytes(size) for size in size_bytes.tolist()],
        hovertemplate="%{customdata}", mode="lines", stackgroup="unused", fillcolor=colour,
        line={"width": 0, "shape": "hv", "color": colour},
    )  # fmt: skip


def _line(name: str, events: Ints, size_bytes: Ints, scale: int) -> go.Scatter:
    return go.Scatter(
        name=name, x=events, y=size_bytes / scale, customdata=[format_bytes(size) for size in size_bytes.tolist()],
        hovertemplate="%{customdata}", mode="lines", line={"width": 1.4, "shape": "hv", "color": LIGHT.text},
    )  # fmt: skip


def _free(segment: Segment) -> int:
    return sum(block.size_bytes for block in segment.blocks if not block.allocated)


def _least_usable(all_segments: Sequence[Segment]) -> list[Segment]:
    stuck = {segment.address: _free(segment) - segment.releasable_bytes for segment in all_segments}
    found = [segment for segment in all_segments if stuck[segment.address]]
    return sorted(found, key=lambda segment: -stuck[segment.address])[:SHOWN_SEGMENTS]


class _BlockGroup(NamedTuple):
    """Neighbouring blocks of one segment with the same owner, drawn as one."""

    kind: str
    row: int
    offset_bytes: int
    size_bytes: int
    text: str


def _pieces(row: int, segment: Segment, trace: Trace, owners: Mapping[int, int]) -> Iterator[_BlockGroup]:
    offset = 0
    held = [(owners.get(block.address) if block.allocated else None, block.size_bytes) for block in segment.blocks]
    for holder, blocks in itertools.groupby(held, key=lambda one: _holder(trace, one[0])):
        sizes = [size for _, size in blocks]
        kind, where = holder
        count = f"{len(sizes):,} blocks" if len(sizes) > 1 else "1 block"
        yield _BlockGroup(kind, row, offset, sum(sizes), f"{kind}, {format_bytes(sum(sizes))} in {count}<br>{where}")
        offset += sum(sizes)


def _holder(trace: Trace, allocation: int | None) -> tuple[str, str]:
    """The category of the allocation in a block, and its module and operator."""
    if allocation is None:
        return _FREE, "free"
    module, op = trace.modules[int(trace.module[allocation])], trace.ops[int(trace.op[allocation])]
    return spoken(CATEGORIES[int(trace.category[allocation])]), escape(f"{module} · {op}" if op else module)


def _category_colours() -> Iterator[tuple[str, str]]:
    return ((spoken(name), LIGHT.categories[name]) for name in CATEGORIES)


def _bars(kind: str, pieces: Sequence[_BlockGroup], scale: int, colour: str) -> go.Bar:
    """Blocks of one kind; free blocks, which have no colour, are hatched."""
    free = not colour
    return go.Bar(
        name=kind, orientation="h", y=[piece.row for piece in pieces], base=[p.offset_bytes / scale for p in pieces],
        x=[piece.size_bytes / scale for piece in pieces], customdata=[piece.text for piece in pieces],
        hovertemplate="%{customdata}<extra></extra>",
        marker={
            "color": colour or LIGHT.surface, "line": {"width": 0.5, "color": LIGHT.muted},
            "pattern": {"shape": "/" if free else "", "fgcolor": colour or LIGHT.muted, "size": 5},
        },
    )  # fmt: skip


if __name__ == "__main__":
    fragmentation(Trace.load(sys.argv[1])).write_html("fragmentation.html")
