"""Colours of categories and phases, for light and dark pages, chosen to stay apart for colour-blind eyes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memscope.trace import Category, Phase

__all__ = ["DARK", "LIGHT", "Theme", "css_variables", "theme_update"]


@dataclass(frozen=True)
class Theme:
    """Every colour of a page, as `#RRGGBB`."""

    background: str
    surface: str
    """Cards, tables and hover labels, drawn on the background."""
    text: str
    muted: str
    """Text of lesser weight; still readable (4.5 to 1) on background and surface."""
    grid: str
    accent: str
    """Links, the peak, keyboard focus."""
    categories: Mapping[Category, str]
    phases: Mapping[Phase, str]

    def colour(self, name: str) -> str:
        """Colour of a category or phase; the text colour for any other curve of a figure, the accent for the peak."""
        named = itertools.chain(self.categories.items(), self.phases.items(), [("peak", self.accent)])
        return next((colour for key, colour in named if key == name), self.text)


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
        "optimizer": "#228833", "zero_grad": "#AA3377", "outside": "#888888",
    },
)  # fmt: skip
"""Categories: the "muted" scheme of P. Tol, Colour Schemes, SRON/EPS/TN/09-002, issue 3.2 (2021); phases: "bright",
with a darker grey for `outside`."""

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
        "optimizer": "#3AA552", "zero_grad": "#C85A96", "outside": "#BBBBBB",
    },
)  # fmt: skip
"""The hues of `LIGHT`, lightened until each category stands out from a dark surface by 3 to 1 (WCAG 2.1, 1.4.11)."""

SHADE = "rgba(128,128,128,0.10)"
"""Background of every second step: visible on light and dark alike."""


def theme_update(names: Sequence[str], theme: Theme) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """What a theme sets in a figure whose curves are called `names`: `(data, layout)`, as `Plotly.update` takes them.

    The figure's first annotation must be its peak.
    """
    colours = [theme.colour(name) for name in names]
    data = {key: colours for key in ("fillcolor", "line.color", "marker.color", "textfont.color")}
    layout = {
        "font.color": theme.text,
        "paper_bgcolor": theme.surface,
        "plot_bgcolor": theme.surface,
        "xaxis.gridcolor": theme.grid,
        "yaxis.gridcolor": theme.grid,
        "xaxis.spikecolor": theme.muted,
        "hoverlabel.bgcolor": theme.surface,
        "hoverlabel.bordercolor": theme.muted,
        "hoverlabel.font.color": theme.text,
        "modebar.color": theme.muted,
        "modebar.activecolor": theme.text,
        "modebar.bgcolor": "rgba(0,0,0,0)",
        "annotations[0].arrowcolor": theme.accent,
        "annotations[0].font.color": theme.accent,
        "annotations[0].bgcolor": theme.surface,
    }
    return data, layout


def css_variables(theme: Theme) -> str:
    """The theme as CSS declarations: `--text:#1B1F24;--parameter:#332288;…`."""
    plain: dict[str, str] = {
        name: getattr(theme, name) for name in ("background", "surface", "text", "muted", "grid", "accent")
    }
    named: dict[str, str] = {name: theme.colour(name) for name in (*theme.categories, *theme.phases)}
    return "".join(f"--{name}:{colour};" for name, colour in {**plain, **named}.items())


if __name__ == "__main__":
    from rich.console import Console

    console = Console()
    for theme in (LIGHT, DARK):
        for name in (*theme.categories, *theme.phases):
            console.print(f"[{theme.colour(name)}]████[/] [{theme.text} on {theme.surface}] {name:<16}[/]")
