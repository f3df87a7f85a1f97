"""The allocator of a run as a part of its section: unused memory over time, and the segments at the peak."""

from __future__ import annotations

from html import escape

from memscope.allocator.view import AllocatorView
from memscope.dashboards.allocator import fragmentation, segments
from memscope.dashboards.html import figure_box, fold, table
from memscope.trace import Trace
from memscope.units import format_bytes

__all__ = ["allocator_part"]

_TOP_SIZES = 12
"""Kinds of segments that are listed."""


def allocator_part(trace: Trace, view: AllocatorView, key: str) -> str:
    """The part, folded: HTML.

    Args:
        trace: the run, on a device with an allocator.
        view: its allocator, as `memscope.dashboards.allocator.look` gives it.
        key: id of the part on the page.
    """
    parts = [
        f"<p>{_unused(trace, view)}</p>",
        figure_box(fragmentation(trace, view=view), "Reserved memory that no tensor requested, over time"),
    ]
    if view.peak is None:
        parts.append(f'<p class="note">{escape(view.unknown)}</p>')
    else:
        label = "Segments at the peak with the most free bytes that cannot be released, their blocks by address"
        parts.append(f"<h4>{label}</h4>{figure_box(segments(trace, view=view), label)}{_kinds(view)}")
    at = int(view.events.searchsorted(trace.peak.event))
    gist = f"{format_bytes(int(view.cached[at]))} of {format_bytes(int(view.reserved[at]))} reserved are free"
    return fold("".join(parts), key=key, title="Allocator", gist=f"{gist} at the peak")


def _unused(trace: Trace, view: AllocatorView) -> str:
    """The reserved memory that could not be used at the peak, in sentences."""
    at = int(view.events.searchsorted(trace.peak.event))
    reserved, cached, rounding = int(view.reserved[at]), int(view.cached[at]), int(view.rounding[at])
    text = (
        f"At the peak, {format_bytes(cached)} of {format_bytes(reserved)} reserved are not allocated, and blocks are "
        f"{format_bytes(rounding)} larger than requested."
    )
    if view.unreleasable is None or view.largest_free is None:
        return text
    stuck, hole = int(view.unreleasable[at]), int(view.largest_free[at])
    return (
        f"{text} The allocator can release {format_bytes(cached - stuck)}. It cannot release {format_bytes(stuck)}, "
        f"which share segments with live allocations. The largest free block has {format_bytes(hole)}: a larger "
        "request needs a new segment."
    )


def _kinds(view: AllocatorView) -> str:
    """The segments at the peak, counted by pool and size."""
    assert view.peak is not None, "called only where segments are known"
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
