"""Pieces of a page as HTML: the frame that fetches nothing, tables, figures. Every text of a trace is escaped here."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from memscope.dashboards.palette import DARK, LIGHT, css_variables, replacements
from memscope.dashboards.phases import LABELLED_SHARE, PHASE_BAR, PHASE_LABEL
from memscope.trace import CATEGORIES, PHASES

__all__ = ["card", "facts", "figure_box", "html_page", "packed", "swatch", "table"]

# Refuses every request, whatever a script may try; plotly's "download plot as png" draws from data: and blob:.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_SCRIPTS = ("figures.js", "curves.js", "timeline.js", "moment.js", "page.js")


def html_page(title: str, heading: str, cards: Iterable[str]) -> str:
    """A whole page that works from a file, with no network.

    Args:
        title: of the window, as text.
        heading: as text.
        cards: HTML, one below the other.
    """
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>',
            f":root{{{css_variables(LIGHT)}}}\n@media (prefers-color-scheme: dark){{:root{{{css_variables(DARK)}}}}}",
            f"{style}</style>\n</head>\n<body>",
            f'<header><p class="brand">memscope</p><h1>{escape(heading)}</h1></header>\n<main>',
            *cards,
            f"</main>\n{_scripts()}\n</body>\n</html>\n",
        ]
    )


def _scripts() -> str:
    own = "\n".join(files(__package__).joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    known = {
        "DARK_COLOURS": replacements(DARK), "CATEGORIES": CATEGORIES, "PHASES": PHASES, "SURFACE": LIGHT.surface,
        "CATEGORY_COLOURS": dict(LIGHT.categories), "TEXT": LIGHT.text,
        "GRID": LIGHT.grid, "PHASE_BAR": PHASE_BAR, "PHASE_LABEL": PHASE_LABEL, "LABELLED_SHARE": LABELLED_SHARE,
    }  # fmt: skip
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in known.items())
    return (
        f'<script type="text/plain" id="plotly">{_packed_plotly()}</script>\n'
        f'<script>\n"use strict";\n{constants}{own}</script>'
    )


@cache
def _packed_plotly() -> str:
    return packed(get_plotlyjs())


def card(body: str, *, key: str = "", title: str = "") -> str:
    """A section of the page: `body` is HTML; `key` its id, needed where it has a title, which is text."""
    if not title:
        return f'<section class="card">{body}</section>'
    return (
        f'<section class="card" id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(title)}</h2>'
        f"{body}</section>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, as text."""
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{listed}</dl>'


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], label: str, kind: str) -> str:
    """A table of ready HTML cells, the first of each row its header. Scrolls sideways when wide, also by keyboard.

    Args:
        headers: HTML, one a column.
        rows: HTML, as many cells each.
        label: the caption, as text.
        kind: classes of the table.
    """
    head = "".join(f'<th scope="col">{header}</th>' for header in headers)
    lines = "".join(
        f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>' for cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table class="{kind}">'
        f"<caption>{escape(label)}</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def figure_box(figure: go.Figure, label: str) -> str:
    """A figure, drawn when it comes into sight; `label` says in words what it shows."""
    height = figure.layout.height
    return (
        f'<div class="figure" role="img" aria-label="{escape(label)}" style="height:{height}px" '
        f'data-figure="{packed(figure.to_json())}"><noscript>{escape(label)}</noscript></div>'
    )


def packed(text: str) -> str:
    """Text, deflated, in base64: much smaller, and free of markup."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def swatch(name: str) -> str:
    """A small square in the colour of a category, a phase, or another named colour of the theme."""
    return f'<span class="swatch" style="--swatch:var(--{name})"></span>'
