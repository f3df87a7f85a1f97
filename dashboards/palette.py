"""Colours of categories and phases for light and dark pages, distinguishable with colour-blind eyes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go

from memscope.trace import Category, Phase

__all__ = ["DARK", "LIGHT", "SHADE", "Theme", "Unused", "css_variables", "dressed", "replacements", "themed"]

Unused = Literal["block rounding", "cached, releasable", "cached, not releasable"]
"""Reserved bytes beyond those requested."""


@dataclass(frozen=True)
class Theme:
    """Every colour of a page, as `#RRGGBB`."""

    background: str
    surface: str
    """Cards, tables and hover labels, drawn on the background."""
    text: str
    muted: str
    """Secondary text; readable (4.5 to 1) on background and surface."""
    grid: str
    accent: str
    """Links, the peak, keyboard focus."""
    categories: Mapping[Category, str]
    phases: Mapping[Phase, str]
    unused: Mapping[Unused, str]

    @property
    def colours(self) -> tuple[str, ...]:
        """Every colour once, in the same order in all themes."""
        return (*self.plain.values(), *self.categories.values(), *self.phases.values(), *self.unused.values())

    @property
    def plain(self) -> dict[str, str]:
        """The colours that represent no data, by name."""
        names = ("background", "surface", "text", "muted", "grid", "accent")
        return {name: getattr(self, name) for name in names}


LIGHT = Theme(
    background="#F6F7F9",
    surface="#FFFFFF",
    text="#1B1F24",
    muted="#57606A",
    grid="#D8DEE4",
    accent="#B3261E",
    categories={
        "parameter": "#332288", "weight_copy": "#88CCEE", "buffer": "#999933", "gradient": "#CC6677",
        "optimizer_state": "#882255", "activation": "#DDCC77", "input": "#AA4499", "temporary": "#44AA99",
        "workspace": "#117733", "other": "#DDDDDD",
    },
    phases={
        "setup": "#BBBBBB", "forward": "#4477AA", "loss": "#66CCEE", "backward": "#EE6677", "recompute": "#CCBB44",
        "optimizer": "#228833", "zero_grad": "#AA3377", "outside": "#888888", "inference": "#EE7733",
    },
    unused={
        "block rounding": "#EECC66", "cached, releasable": "#6699CC", "cached, not releasable": "#994455",
    },
)  # fmt: skip
"""Categories: the "muted" scheme of P. Tol, Colour Schemes, SRON/EPS/TN/09-002, issue 3.2 (2021); phases: "bright",
with a darker grey for `outside` and the orange of "vibrant" for `inference`; unused memory: three of "medium
contrast"."""

DARK = Theme(
    background="#0E1116",
    surface="#14171C",
    text="#E6EAF0",
    muted="#9DA7B3",
    grid="#30363D",
    accent="#FF8A80",
    categories={
        "parameter": "#6A5ACD", "weight_copy": "#A6DDF7", "buffer": "#A8A832", "gradient": "#E0707F",
        "optimizer_state": "#B03A78", "activation": "#E6D585", "input": "#C77DC9", "temporary": "#43B5A3",
        "workspace": "#2A8C4A", "other": "#F2F2F2",
    },
    phases={
        "setup": "#888888", "forward": "#5E93C8", "loss": "#66CCEE", "backward": "#EE6677", "recompute": "#CCBB44",
        "optimizer": "#3AA552", "zero_grad": "#C85A96", "outside": "#BBBBBB", "inference": "#FF9955",
    },
    unused={
        "block rounding": "#F0D27A", "cached, releasable": "#7FB0DE", "cached, not releasable": "#C26A7B",
    },
)  # fmt: skip
"""The hues of `LIGHT`, lightened until each category stands out from a dark surface by 3 to 1 (WCAG 2.1, 1.4.11)."""

SHADE = "rgba(128,128,128,0.10)"
"""Background of every second step, visible on light and dark surfaces."""


def dressed(**more: Any) -> dict[str, Any]:
    """The layout that all figures share, in the colours of `LIGHT`, with additions for one figure."""
    axis = {"gridcolor": LIGHT.grid, "zeroline": False, "exponentformat": "none", "separatethousands": True}
    shared = {
        "template": "none",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": LIGHT.text},
        "paper_bgcolor": LIGHT.surface,
        "plot_bgcolor": LIGHT.surface,
        "hoverlabel": {
            "bgcolor": LIGHT.surface, "bordercolor": LIGHT.muted, "font": {"color": LIGHT.text}, "namelength": -1,
            "align": "left",
        },
        "modebar": {"color": LIGHT.muted, "activecolor": LIGHT.text, "bgcolor": "rgba(0,0,0,0)"},
        "xaxis": axis,
        "yaxis": axis,
    }  # fmt: skip
    for name, value in more.items():
        own = shared.get(name)
        shared[name] = {**own, **value} if isinstance(own, dict) else value
    return shared


def themed(figure: go.Figure, theme: Theme) -> go.Figure:
    """A figure that is drawn in the colours of `LIGHT`, in those of another theme."""
    return figure if theme is LIGHT else go.Figure(_recoloured(figure.to_dict(), replacements(theme)))


def replacements(theme: Theme) -> dict[str, str]:
    """Each colour of `LIGHT` with the corresponding colour of another theme."""
    return dict(zip(LIGHT.colours, theme.colours, strict=True))


def _recoloured(value: Any, colours: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return colours.get(value, value)
    if isinstance(value, dict):
        return {key: _recoloured(inner, colours) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_recoloured(inner, colours) for inner in value]
    return value


def css_variables(theme: Theme) -> str:
    """The theme as CSS declarations: `--text:#1B1F24;--parameter:#332288;…`."""
    named = itertools.chain(theme.plain.items(), theme.categories.items(), theme.phases.items())
    return "".join(f"--{name}:{colour};" for name, colour in named)


if __name__ == "__main__":
    from rich.console import Console

    console = Console()
    for theme in (LIGHT, DARK):
        for name, colour in itertools.chain(theme.categories.items(), theme.phases.items(), theme.unused.items()):
            console.print(f"[{colour}]████[/] [{theme.text} on {theme.surface}] {name:<16}[/]")
