"""What a budget of time buys, as a page: parameters and tokens of every case, beside Chinchilla's optimum."""

from __future__ import annotations

from html import escape
from pathlib import Path

import plotly.graph_objects as go

from memscope.dashboards.html import Section, card, facts, figure_box, html_page, next_step, save_page, table
from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.studies.budget import TOKENS_PER_PARAMETER, Optimum, TimeBudget
from memscope.trace import Category
from memscope.units import format_bytes, format_seconds

__all__ = ["tokens_by_parameters", "write_budget_page"]

_COLOURS: tuple[Category, ...] = ("parameter", "activation", "gradient", "optimizer_state", "workspace", "temporary")


def tokens_by_parameters(found: TimeBudget, theme: Theme = LIGHT) -> go.Figure:
    """Tokens over parameters, a line for each micro-batch that fits, and the line of 20 tokens for each parameter.

    A star marks the compute-optimal model of as many operations as the best case.
    """
    figure = go.Figure()
    fitting = [row for row in found.rows if row.fits and row.tokens]
    for index, batch in enumerate(sorted({row.micro_batch for row in fitting})):
        chosen = sorted((row for row in fitting if row.micro_batch == batch), key=lambda row: row.parameters)
        colour = LIGHT.categories[_COLOURS[index % len(_COLOURS)]]
        figure.add_trace(
            go.Scatter(
                name=f"micro-batch {batch}", x=[row.parameters for row in chosen], y=[row.tokens for row in chosen],
                mode="lines+markers", line={"color": colour, "width": 1.4}, marker={"size": 9, "color": colour},
                customdata=[
                    f"{found.question.vary}={row.size}: {format_seconds(row.step_seconds)} a step, MFU {row.mfu:.1%}"
                    for row in chosen
                ],
                hovertemplate="%{customdata}<br>%{x:.3s} parameters, %{y:.3s} tokens<extra></extra>",
            )
        )  # fmt: skip
    stars = [("at the device's peak", found.at_peak)]
    if found.best is not None:
        stars.insert(0, ("compute-optimal", Optimum(found.best.flops)))
    ends = [row.parameters for row in found.rows] + [optimum.parameters for _, optimum in stars]
    line = [min(ends) / 1.2, max(ends) * 1.2]
    figure.add_trace(
        go.Scatter(
            name=f"{TOKENS_PER_PARAMETER} tokens per parameter", x=line, y=[TOKENS_PER_PARAMETER * x for x in line],
            mode="lines", line={"color": LIGHT.muted, "dash": "dot", "width": 1.2}, hoverinfo="skip",
        )
    )  # fmt: skip
    for (name, optimum), symbol in zip(stars, ("star", "star-open"), strict=False):
        figure.add_trace(
            go.Scatter(
                name=name, x=[optimum.parameters], y=[optimum.tokens], mode="markers",
                marker={"symbol": symbol, "size": 14, "color": LIGHT.accent},
                hovertemplate="%{x:.3s} parameters, %{y:.3s} tokens<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(
        dressed(
            height=460,
            margin={"l": 60, "r": 12, "t": 34, "b": 50},
            xaxis={"title": {"text": "parameters", "standoff": 6}, "type": "log"},
            yaxis={"title": {"text": "tokens", "standoff": 6}, "type": "log"},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        )
    )
    return themed(figure, theme)


def write_budget_page(found: TimeBudget, path: Path, following: str = "", *, overwrite: bool) -> None:
    """The page of a budget: the answer, the picture, and every case.

    Args:
        found: what the budget buys.
        path: the page to write.
        following: the command that follows, as a shell takes it; empty: none is named.
        overwrite: whether the page may exist.

    Raises:
        UsageError: when the file exists and `overwrite` is False.
        TraceFileError: when it cannot be written.
    """
    asked, best, peak = found.question, found.best, found.at_peak
    told = [
        ("budget", f"{asked.seconds / 3600:.3g} h on {asked.device.name}"),
        ("strategies", asked.strategies or "none"),
        ("at the device's 16-bit peak", f"{peak.parameters:,.0f} parameters, {peak.tokens:,.0f} tokens"),
    ]
    if best is not None:
        told.append(("smallest expected loss", f"{asked.vary}={best.size}, micro-batch {best.micro_batch}"))
    title = "What the budget buys"
    sections = [Section("budget", title, card(facts(told) + next_step(following), key="budget", title=title))]
    label = "Tokens over parameters of every case that fits, with the compute-optimal models; the table has the same"
    body = figure_box(tokens_by_parameters(found), label) + _table(found)
    title = "Tokens and parameters"
    sections.append(Section("cases", title, card(body, key="cases", title=title)))
    name = f"{asked.target}: {asked.seconds / 3600:.3g} h on {asked.device.name}"
    save_page(path, html_page(f"memscope: {name}", name, sections), overwrite=overwrite)


def _table(found: TimeBudget) -> str:
    headers = (
        escape(found.question.vary), "parameters", "micro-batch", "memory", "step (estimate)", "iterations", "tokens",
        "MFU", "expected loss",
    )  # fmt: skip
    rows = []
    for row in found.rows:
        memory = format_bytes(row.needed_bytes) if row.fits else "does not fit"
        cells = [escape(row.size), f"{row.parameters:,}", f"{row.micro_batch:,}", memory]
        spent = [format_seconds(row.step_seconds), f"{row.iterations:,}", f"{row.tokens:,}", f"{row.mfu:.1%}"]
        loss = f"{row.loss:.3f}" if row.tokens else "–"
        rows.append([*cells, *([*spent, loss] if row.fits else ["–"] * 5)])
    return table(headers, rows, "Simulated cases", "cases")
