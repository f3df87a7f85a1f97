"""A checkpoint plan as a page: the option of each layer, the alternatives, and the step with the plan."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from memscope.advisor.advice import Advice, FrontPoint
from memscope.advisor.layer_words import in_words, short_option
from memscope.analysis.chosen import with_chosen
from memscope.analysis.effects import Run
from memscope.dashboards.head import page_head
from memscope.dashboards.html import Section, card, facts, figure_box, html_page, next_step, save_page, table
from memscope.dashboards.page import run_sections
from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.dashboards.timeline import unit_of
from memscope.errors import UsageError
from memscope.trace import Trace
from memscope.units import format_both, format_bytes, format_seconds

__all__ = ["kept_by_layer", "pareto_front", "plan_card", "plan_heatmap", "write_plan_page"]

_LONGEST_OPTION = 34
_WITHIN = "within:"


def plan_heatmap(
    layers: Mapping[str, str], kept_bytes: Mapping[str, int] | None = None, theme: Theme = LIGHT
) -> go.Figure:
    """The option that each layer of a plan takes: layers from left to right, options from top to bottom.

    Args:
        layers: option of each layer by its name, in the order of a plan file.
        kept_bytes: bytes that each layer keeps for its backward pass, from `kept_by_layer`; colours the cells.
        theme: colours.

    Raises:
        UsageError: when there is no layer.
    """
    if not layers:
        raise UsageError("a heatmap of a plan needs layers, and this plan has none")
    options = _options(layers)
    names, kinds = list(layers), list(dict.fromkeys(options.values()))
    most = max(kept_bytes.values(), default=0) if kept_bytes else 1
    unit, scale = unit_of(most) if kept_bytes else ("", 1)
    cells = [[_cell(options[name] == kind, kept_bytes, name, scale) for name in names] for kind in kinds]
    texts = [[_text(name, layers[name], kept_bytes) for name in names] for _ in kinds]
    figure = go.Figure(
        go.Heatmap(
            x=list(range(len(names))), y=list(range(len(kinds))), z=cells, customdata=texts, xgap=1, ygap=2,
            zmin=0, zmax=most / scale, hovertemplate="%{customdata}<extra></extra>", hoverongaps=False,
            showscale=kept_bytes is not None,
            colorscale=[[0, LIGHT.categories["activation"]], [1, LIGHT.categories["parameter"]]],
            colorbar={
                "title": {"text": f"{unit} kept for the backward pass", "side": "top"}, "thickness": 10, "len": 0.6,
                "orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
            },
        )
    )  # fmt: skip
    every, lists = -(-len(names) // 12), list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    listed = ", ".join(f"{one}.*" for one in lists if one)
    figure.update_layout(
        dressed(
            height=(150 if kept_bytes else 80) + 34 * len(kinds),
            margin={"l": 60, "r": 12, "t": 80 if kept_bytes else 12, "b": 44},
            xaxis={
                "tickvals": list(range(0, len(names), every)), "showgrid": False, "tickangle": 0,
                "ticktext": [escape(name.rpartition(".")[2]) for name in names[::every]],
                "title": {"text": escape(listed) or "layer", "standoff": 6},
            },
            yaxis={
                "tickvals": list(range(len(kinds))), "ticktext": [escape(_shortened(kind)) for kind in kinds],
                "autorange": "reversed", "automargin": True, "showgrid": False,
            },
        )
    )  # fmt: skip
    return themed(figure, theme)


def _options(layers: Mapping[str, str]) -> dict[str, str]:
    """The option of each layer; within a checkpoint over several layers, the option of the first of them."""
    return {name: layers.get(option.removeprefix(_WITHIN), option) for name, option in layers.items()}


def _cell(chosen: bool, kept_bytes: Mapping[str, int] | None, name: str, scale: int) -> float | None:
    if not chosen:
        return None
    return kept_bytes.get(name, 0) / scale if kept_bytes else 0.0


def _text(name: str, option: str, kept_bytes: Mapping[str, int] | None) -> str:
    kept = f"<br>keeps {format_bytes(kept_bytes.get(name, 0))} for its backward pass" if kept_bytes else ""
    return f"{escape(name)}<br>{escape(option)}{kept}"


def _shortened(option: str) -> str:
    words = short_option(option)
    return words if len(words) <= _LONGEST_OPTION else f"{words[: _LONGEST_OPTION - 1]}…"


def kept_by_layer(trace: Trace, layers: Sequence[str]) -> dict[str, int]:
    """Bytes of activations by layer, at the event where the activations of the run are largest.

    Raises:
        UsageError: when the trace is empty.
    """
    at = trace.by("category", "module", at=int(np.argmax(trace.timeline("activation"))) if trace.events else "peak")
    kept = dict.fromkeys(layers, 0)
    for (category, module), size_bytes in at.items():
        owner = next((name for name in layers if module == name or module.startswith(f"{name}.")), None)
        if category == "activation" and owner is not None:
            kept[owner] += size_bytes
    return kept


def pareto_front(advice: Advice, theme: Theme = LIGHT) -> go.Figure:
    """Memory against time: every plan that no other plan beats in both, and the budget. Times are estimates."""
    fits = [point for point in advice.front if point.peak.device <= advice.budget_bytes]
    others = [point for point in advice.front if point not in fits]
    figure = go.Figure()
    if fits:
        figure.add_trace(_points("fits the budget", fits, LIGHT.categories["workspace"], "circle"))
    if others:
        figure.add_trace(_points("does not fit", others, LIGHT.categories["gradient"], "x"))
    if advice.feasible:
        figure.add_trace(_chosen(advice))
    figure.add_vline(advice.budget_bytes / 2**30, line={"color": LIGHT.accent, "dash": "dot", "width": 1.4})
    figure.add_annotation(
        x=advice.budget_bytes / 2**30, y=1, yref="paper", yanchor="top", xanchor="left", showarrow=False,
        text=f" budget {format_bytes(advice.budget_bytes)}", font={"color": LIGHT.accent},
    )  # fmt: skip
    figure.update_layout(
        dressed(
            height=360,
            margin={"l": 60, "r": 12, "t": 34, "b": 50},
            xaxis={"title": {"text": "GiB on the device", "standoff": 6}},
            yaxis={"title": {"text": "seconds a step (estimate)", "standoff": 6}},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        )
    )
    return themed(figure, theme)


def _chosen(advice: Advice) -> go.Scatter:
    return go.Scatter(
        name="chosen", x=[advice.peak.device / 2**30], y=[advice.step_seconds], mode="markers", hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 20, "color": LIGHT.text, "line": {"width": 2}},
    )  # fmt: skip


def _points(name: str, points: Sequence[FrontPoint], colour: str, symbol: str) -> go.Scatter:
    return go.Scatter(
        name=name, x=[point.peak.device / 2**30 for point in points], y=[point.step_seconds for point in points],
        mode="markers",
        marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 1, "color": LIGHT.text}},
        customdata=[_point_text(point) for point in points], hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _point_text(point: FrontPoint) -> str:
    strategies = escape(", ".join(point.strategies) or "no strategy")
    return (
        f"{strategies}<br>checkpointed: {escape(point.recomputed)}<br>"
        f"{format_bytes(point.peak.device)}, {format_seconds(point.step_seconds)}"
    )


def plan_card(layers: Mapping[str, str], title: str, kept_bytes: Mapping[str, int] | None = None) -> Section:
    """The heatmap of a plan as a section of a page.

    Raises:
        UsageError: when there is no layer.
    """
    words = f"Checkpointed: {in_words(layers)}"
    body = f"<p>{escape(words)}</p>{figure_box(plan_heatmap(layers, kept_bytes), f'Option of each layer. {words}')}"
    return Section("plan", title, card(body, key="plan", title=title))


def write_plan_page(advice: Advice, path: Path, following: str = "", *, overwrite: bool) -> None:
    """The page of an advice: the plan, layer by layer, the plans it was chosen from, and the simulated step.

    Args:
        advice: the advice.
        path: the page to write.
        following: the command that follows, as a shell takes it; empty: none is named.
        overwrite: whether the page may exist.

    Raises:
        UsageError: when the file exists and `overwrite` is False.
        TraceFileError: when it cannot be written.
    """
    head, heading = "", _heading(advice)
    sections = [
        Section("advice", heading, card(facts(_facts(advice)) + next_step(following), key="advice", title=heading))
    ]
    if advice.layers:
        kept = kept_by_layer(advice.trace, list(advice.layers)) if advice.trace else None
        sections.append(plan_card(advice.layers, "Layers", kept))
    if advice.front:
        sections.append(_front_card(advice))
    if advice.trace is not None and advice.trace.events:
        runs = [Run("The step with this plan", advice.trace)]
        sections += run_sections(runs)
        head = page_head(runs)
    title = f"{advice.target} in {format_bytes(advice.budget_bytes)}"
    save_page(path, html_page(f"memscope: {title}", title, sections, head), overwrite=overwrite)


def _heading(advice: Advice) -> str:
    if advice.feasible:
        return "The plan"
    return "No plan was found that fits" if advice.untried else "Nothing fits"


def _facts(advice: Advice) -> list[tuple[str, str]]:
    peak, binding = advice.peak, advice.binding
    event = f"{format_bytes(binding.allocated)} in step {binding.step}, {binding.phase}, {binding.module}"
    found = [
        ("needs" if advice.feasible else "least that a simulated plan needs", format_bytes(peak.device)),
        ("budget", format_both(advice.budget_bytes)),
        *([("fit", str(advice.fit))] if advice.feasible else []),
        ("device", advice.device),
        ("strategies", ", ".join(with_chosen(advice.strategies, advice.trace)) or "none needed"),
        ("allocated, reserved", f"{format_bytes(peak.allocated)}, {format_bytes(peak.reserved)}"),
        ("step time (estimate)", format_seconds(advice.step_seconds)),
        ("against no checkpointing", f"{advice.overhead_vs_none:+.1%}"),
        ("against all layers", f"{advice.overhead_vs_all:+.1%}"),
        ("peak", f"{event}, {binding.op}" if binding.op else event),
    ]
    if binding.helps:
        found.append(("to reduce the peak", binding.helps))
    found.append(("proof", advice.proof))
    if advice.file:
        found.append(("plan file", str(advice.file)))
    return [*found, *(("note", note) for note in advice.notes)]


def _front_card(advice: Advice) -> Section:
    rows = [
        [
            format_bytes(point.peak.device),
            format_seconds(point.step_seconds),
            escape(", ".join(point.strategies) or "none"),
            escape(point.recomputed),
        ]
        for point in advice.front
    ]
    headers = ("on the device", "step (estimate)", "strategies", "checkpointed")
    listed = table(headers, rows, "Plans that no other plan beats in both", "front")
    label = "Memory against time of every plan that no other beats in both; the table below has the same"
    title = "Memory against time"
    return Section("front", title, card(figure_box(pareto_front(advice), label) + listed, key="front", title=title))


if __name__ == "__main__":
    layers = {f"layers.{index}": "full" if index < 20 else "none" for index in range(32)}
    plan_heatmap(layers).write_html(sys.argv[1] if len(sys.argv) > 1 else "plan.html")
