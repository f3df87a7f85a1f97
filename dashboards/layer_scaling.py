"""Activation memory over the number of layers, for several ways to checkpoint them."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import plotly.graph_objects as go

from memscope.dashboards.palette import LIGHT, Theme, dressed, themed
from memscope.dashboards.timeline import unit_of
from memscope.trace import Category

__all__ = ["activation_by_layers"]

_COLOURS: tuple[Category, ...] = ("activation", "gradient", "optimizer_state", "parameter", "temporary")


def activation_by_layers(curves: Mapping[str, Mapping[int, int]], theme: Theme = LIGHT) -> go.Figure:
    """The largest size of the activations, by number of layers: one curve for each way to checkpoint.

    Args:
        curves: name of a way → number of layers → bytes.
        theme: colours.
    """
    most = max(size for curve in curves.values() for size in curve.values())
    unit, scale = unit_of(most)
    figure = go.Figure()
    for (name, curve), category in zip(curves.items(), _COLOURS, strict=False):
        figure.add_trace(
            go.Scatter(
                name=name, x=list(curve), y=[size / scale for size in curve.values()], mode="lines+markers",
                line={"color": LIGHT.categories[category], "width": 2.2}, marker={"size": 6},
            )
        )  # fmt: skip
    figure.update_layout(
        dressed(
            height=380,
            margin={"l": 64, "r": 16, "t": 64, "b": 48},
            xaxis={"title": {"text": "layers", "standoff": 6}, "rangemode": "tozero", "gridcolor": LIGHT.grid},
            yaxis={"title": {"text": f"activations, {unit}", "standoff": 6}, "rangemode": "tozero"},
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        )
    )
    return themed(figure, theme)


if __name__ == "__main__":
    made_up = {"no checkpoints": {1: 10, 4: 40, 9: 90}, "√n": {1: 10, 4: 20, 9: 30}}
    activation_by_layers(made_up).write_html(sys.argv[1] if len(sys.argv) > 1 else "layers.html")
