"""What fits a device, as a page: memory over micro-batch and length, with a line for each device."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from memscope.advisor.fit.fitting import Evidence, Fitting
from memscope.dashboards.html import Section, card, facts, figure_box, html_page, next_step, save_page, table
from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.trace import Category
from memscope.units import format_bytes, format_seconds

__all__ = ["memory_by_size", "write_fit_page"]

_COLOURS: tuple[Category, ...] = ("parameter", "activation", "gradient", "optimizer_state", "workspace", "temporary")


def memory_by_size(found: Fitting, theme: Theme = LIGHT) -> go.Figure:
    """Memory of every simulated size: micro-batches from left to right, a line for each length, × does not fit.

    A dotted line is the memory of a device; that of the device that was asked for is marked.
    """
    figure = go.Figure()
    lengths = sorted({one.size.seq_len or 0 for one in found.evidence})
    for index, length in enumerate(lengths):
        chosen = [one for one in found.evidence if (one.size.seq_len or 0) == length]
        figure.add_trace(_line(length, chosen, LIGHT.categories[_COLOURS[index % len(_COLOURS)]]))
    for device in found.lines:
        is_asked = device.capacity_bytes == found.capacity_bytes
        colour = LIGHT.accent if is_asked else LIGHT.muted
        figure.add_hline(
            device.capacity_bytes / 2**30, line={"color": colour, "dash": "dot", "width": 1.6 if is_asked else 1},
            annotation={"text": escape(device.name), "font": {"color": colour}}, annotation_position="top right",
        )  # fmt: skip
    figure.update_layout(
        dressed(
            height=460,
            margin={"l": 60, "r": 12, "t": 34, "b": 50},
            xaxis={
                "title": {"text": "micro-batch", "standoff": 6},
                "tickmode": "array",
                "tickvals": sorted({one.size.micro_batch for one in found.evidence}),
            },
            yaxis={"title": {"text": "GiB on the device", "standoff": 6}, "rangemode": "tozero"},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        )
    )
    return themed(figure, theme)


def _line(length: int, chosen: Sequence[Evidence], colour: str) -> go.Scatter:
    return go.Scatter(
        name=f"{length:,} tokens" if length else "needs",
        x=[one.size.micro_batch for one in chosen], y=[one.peak.device / 2**30 for one in chosen],
        mode="lines+markers", line={"color": colour, "width": 1.4},
        marker={"symbol": ["circle" if one.fits else "x" for one in chosen], "size": 10, "color": colour},
        customdata=[f"{one.size}: {format_bytes(one.peak.device)}, {_verdict(one.fits)}" for one in chosen],
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def write_fit_page(found: Fitting, path: Path, following: str = "", *, overwrite: bool) -> None:
    """The page of what fits: the answers, the picture, the simulations, the devices, and the changes.

    Args:
        found: what fits.
        path: the page to write.
        following: the command that follows, as a shell takes it; empty: none is named.
        overwrite: whether the page may exist.

    Raises:
        UsageError: when the file exists and `overwrite` is False.
        TraceFileError: when it cannot be written.
    """
    heading = "It fits" if found.fits else "It does not fit"
    sections = [Section("fit", heading, card(facts(_facts(found)) + next_step(following), key="fit", title=heading))]
    title = "Memory by micro-batch and length"
    label = "Memory of every simulated size, with the memory of devices; the table below has the same"
    body = figure_box(memory_by_size(found), label) + _evidence_table(found)
    sections.append(Section("sizes", title, card(body, key="sizes", title=title)))
    if found.changes:
        rows = [
            [escape(one.strategies), format_bytes(one.device_bytes), format_seconds(one.step_seconds)]
            for one in found.changes
        ]
        listed = table(("-s", "on the device", "step (estimate)"), rows, "Cheapest changes first", "changes")
        sections.append(Section("changes", "What makes it fit", card(listed, key="changes", title="What makes it fit")))
    sections.append(Section("devices", "Devices", card(_device_table(found), key="devices", title="Devices")))
    name = f"{found.target} on {found.device}"
    save_page(path, html_page(f"memscope: {name}", name, sections), overwrite=overwrite)


def _verdict(fits: bool) -> str:
    return "fits" if fits else "runs out of memory"


def _facts(found: Fitting) -> list[tuple[str, str]]:
    peak = found.peak
    told = [
        ("asked", str(found.asked.size)),
        ("strategies", found.strategies or "none"),
        ("needs", f"{format_bytes(peak.device)} of {format_bytes(found.capacity_bytes)}"),
        *([("fit", str(found.margin))] if found.fits else []),
        ("allocated, reserved", f"{format_bytes(peak.allocated)}, {format_bytes(peak.reserved)}"),
        ("largest micro-batch", str(found.micro_batch)),
    ]
    if found.seq_len is not None:
        told.append(("longest context", str(found.seq_len)))
    smallest = found.smallest_device
    told.append(("smallest listed device", smallest.name if smallest else "none of them holds it"))
    told += [("note", note) for note in found.notes]
    return [*told, *(("assumed", str(assumption)) for assumption in found.assumptions)]


def _evidence_table(found: Fitting) -> str:
    rows = [
        [
            f"{one.size.micro_batch:,}",
            "" if one.size.seq_len is None else f"{one.size.seq_len:,}",
            format_bytes(one.peak.device),
            _verdict(one.fits),
        ]
        for one in found.evidence
    ]
    headers = ("micro-batch", "tokens", "on the device", "")
    return table(headers, rows, f"Simulated on {found.device}", "evidence")


def _device_table(found: Fitting) -> str:
    rows = [
        [
            escape(one.name),
            format_bytes(one.capacity_bytes),
            "not known" if one.device_bytes is None else format_bytes(one.device_bytes),
            "fits" if one.fits else "does not fit",
        ]
        for one in found.devices
    ]
    return table(("device", "memory", "must hold", ""), rows, f"Devices that hold {found.asked.size}", "devices")
