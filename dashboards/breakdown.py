"""The allocations alive at a moment, as areas: modules within modules, in them operators, in these categories."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from memscope.analysis.alive import together
from memscope.dashboards.names import spoken
from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.trace import CATEGORIES, Category, Trace
from memscope.units import format_bytes

__all__ = ["AreaNode", "breakdown", "tree"]

_SMALLEST_SHARE = 1 / 2000
"""Siblings with less than this share of the whole become one area: each alone would be invisible."""
SMALLEST_TEXT_PX = 10
"""Labels of areas are hidden where they would have to be smaller."""
SMALLER = "smaller ones"
_SEPARATOR = "\x1f"
"""Separates the labels in an id; no name contains it."""
_PART = re.compile(r"\.(?!(?:\d+|\*)(?:\.|$))")
"""Where the name of a module is split: not before the number of a layer, which stays with the name of its list."""


@dataclass
class AreaNode:
    """One area: a module, an operator in it, or a category of the allocations of that operator."""

    label: str
    size_bytes: int = 0
    count: int = 0
    category: Category = "other"
    """The category with the most bytes in it."""
    inner: dict[str, AreaNode] = field(default_factory=dict)


def breakdown(
    trace: Trace, at: int | Literal["peak"] = "peak", *, layers_together: bool = True, theme: Theme = LIGHT
) -> go.Figure:
    """The allocations alive after an event, as a treemap of modules, operators, categories, coloured by category.

    Args:
        trace: the run.
        at: the event.
        layers_together: count modules whose names differ only by the number of a layer together.
        theme: colours.

    Raises:
        UsageError: when the trace is empty or the event outside it.
    """
    event = trace.peak.event if at == "peak" else at
    rows = list(_rows("", tree(trace, event, layers_together=layers_together)))
    total = rows[0][2].size_bytes or 1
    figure = go.Figure(
        go.Treemap(
            ids=[key for key, _, _ in rows],
            parents=[parent for _, parent, _ in rows],
            labels=[escape(node.label) for _, _, node in rows],
            values=[node.size_bytes for _, _, node in rows],
            branchvalues="total",
            # The root has no category, and Plotly writes its label in the colour of text on any background.
            marker={"colors": [LIGHT.grid, *(LIGHT.categories[node.category] for _, _, node in rows[1:])]},
            customdata=[
                [
                    format_bytes(node.size_bytes),
                    f"{node.size_bytes / total:.1%}",
                    f"{node.count:,}",
                    spoken(node.category),
                ]
                for _, _, node in rows
            ],
            texttemplate="%{label}<br>%{customdata[0]}",
            hovertemplate="%{label}<br>%{customdata[0]}, %{customdata[1]} of all<br>%{customdata[2]} allocations, "
            "mostly %{customdata[3]}<extra></extra>",
            pathbar={"thickness": 22},
            sort=True,
        )
    )
    figure.update_layout(
        dressed(
            height=420,
            margin={"l": 0, "r": 0, "t": 26, "b": 4},
            uniformtext={"minsize": SMALLEST_TEXT_PX, "mode": "hide"},
        )
    )
    return themed(figure, theme)


def tree(trace: Trace, event: int, *, layers_together: bool = True) -> AreaNode:
    """Everything alive after an event, from the whole down to categories.

    Siblings with less than a two-thousandth of the whole become one node, "smaller ones", so that the bytes of a node
    are always the sum of the bytes of its parts.

    Raises:
        UsageError: when the event is outside the trace.
    """
    alive = trace.at(event)
    keys = np.stack([trace.module[alive], trace.op[alive], trace.category[alive]])
    groups, index = np.unique(keys, axis=1, return_inverse=True)
    sizes, counts = np.zeros((2, groups.shape[1]), dtype=np.int64)
    np.add.at(sizes, index.reshape(-1), trace.size[alive])
    np.add.at(counts, index.reshape(-1), 1)
    root = AreaNode("allocated")
    for module, op, code, size_bytes, count in zip(*groups.tolist(), sizes.tolist(), counts.tolist(), strict=True):
        name = together(trace.modules[module]) if layers_together else trace.modules[module]
        within = [*_PART.split(name or "(no module)"), trace.ops[op]]
        _add(root, [label for label in within if label], CATEGORIES[code], size_bytes, count)
    _finish(root, root.size_bytes * _SMALLEST_SHARE)
    return root


def _add(root: AreaNode, within: list[str], category: Category, size_bytes: int, count: int) -> None:
    path = [root]
    for label in (*within, spoken(category)):
        path.append(path[-1].inner.setdefault(label, AreaNode(label)))
    path[-1].category = category
    for node in path:
        node.size_bytes += size_bytes
        node.count += count


def _finish(node: AreaNode, smallest: float) -> dict[Category, int]:
    """Gather nodes that are too small, set the largest category of each node, and return its bytes by category."""
    if not node.inner:
        return {node.category: node.size_bytes}
    sums: dict[Category, int] = {}
    for inner in node.inner.values():
        for category, size_bytes in _finish(inner, smallest).items():
            sums[category] = sums.get(category, 0) + size_bytes
    node.category = _most(sums)
    small = [label for label, inner in node.inner.items() if inner.size_bytes < smallest]
    if small:
        gone = [node.inner.pop(label) for label in small]
        rest = node.inner[SMALLER] = AreaNode(SMALLER, sum(g.size_bytes for g in gone), sum(g.count for g in gone))
        rest.category = max(gone, key=lambda inner: inner.size_bytes).category
    return sums


def _most(sums: dict[Category, int]) -> Category:
    """The largest category; of equal ones, the first in the order of `CATEGORIES`."""
    return max(CATEGORIES, key=lambda category: sums.get(category, -1))


def _rows(parent: str, node: AreaNode) -> Iterable[tuple[str, str, AreaNode]]:
    """`(id, id of the parent, node)` of a node and of all nodes within it."""
    key = f"{parent}{_SEPARATOR}{node.label}" if parent else node.label
    yield key, parent, node
    for inner in node.inner.values():
        yield from _rows(key, inner)
