"""Pieces of a page as HTML: the frame, the list of sections, tables, figures. Escapes every text of a trace."""

from __future__ import annotations

import base64
import datetime
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from memscope.dashboards.names import spoken
from memscope.dashboards.palette import DARK, LIGHT, css_variables, replacements
from memscope.dashboards.phases import LABELLED_SHARE, PHASE_BAR, PHASE_LABEL
from memscope.errors import UsageError
from memscope.trace import CATEGORIES, PHASES, write_whole

__all__ = [
    "Section", "card", "code", "facts", "figure_box", "fold", "html_page", "next_step", "packed", "save_page", "swatch",
    "table",
]  # fmt: skip

# Refuses every request of every script; Plotly's "Download plot as a PNG" draws from data: and blob: addresses.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_SCRIPTS = (
    "figures.js", "sizes.js", "curves.js", "areas.js", "moment.js", "hover.js", "timeline.js", "contents.js",
    "search.js", "page.js",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A section of a page, with its entry in the list of sections."""

    key: str
    """Its id on the page."""
    title: str
    """Plain text."""
    html: str
    note: str = ""
    """Plain text beside the title in the list, such as the peak of a run."""
    parts: tuple[tuple[str, str], ...] = ()
    """`(id, title)` of the parts to list under it."""


def html_page(title: str, heading: str, sections: Sequence[Section], head: str = "") -> str:
    """A whole page that works from a file, with no network.

    Args:
        title: title of the window, plain text.
        heading: main heading, plain text.
        sections: from top to bottom.
        head: HTML below the heading: facts about all runs.
    """
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    today = datetime.date.today()
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>',
            f":root{{{css_variables(LIGHT)}}}\n@media (prefers-color-scheme: dark){{:root{{{css_variables(DARK)}}}}}",
            f'{style}</style>\n</head>\n<body>\n<a class="skip" href="#main">Skip to the figures</a>',
            f'{_contents(sections)}\n<div class="page">\n<header><p class="made">Page made on '
            f'<time datetime="{today.isoformat()}">{today.day} {today:%B %Y}</time></p>',
            f"<h1>{escape(heading)}</h1>{head}</header>",
            '<main id="main">',
            *(section.html for section in sections),
            f"</main>\n</div>\n{_scripts()}\n</body>\n</html>\n",
        ]
    )


def save_page(path: Path, html: str, *, overwrite: bool) -> None:
    """Write a page.

    Args:
        path: the file.
        html: the page.
        overwrite: whether the file may exist.

    Raises:
        UsageError: when it exists and `overwrite` is False.
        TraceFileError: when it cannot be written.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: choose another name with --html, or overwrite with -f")
    write_whole(path, html.encode())


def _contents(sections: Sequence[Section]) -> str:
    """The bar that stays in sight: search, and a link to every section and its parts."""
    return (
        '<aside class="contents"><p class="brand">memscope</p><div class="search" role="search">'
        '<input type="search" id="search" placeholder="Find a module or operator" autocomplete="off" '
        'spellcheck="false" aria-label="Find a module or operator" aria-keyshortcuts="/" '
        'aria-describedby="found"><kbd aria-hidden="true">/</kbd>'
        '<p id="found" aria-live="polite"></p></div>'
        f'<nav aria-label="sections"><ul>{"".join(map(_entry, sections))}</ul></nav>'
        '<button type="button" class="all" aria-pressed="false">Unfold all</button></aside>'
    )


def _entry(section: Section) -> str:
    note = f" <span>{escape(section.note)}</span>" if section.note else ""
    parts = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title in section.parts)
    return (
        f'<li><a href="#{section.key}"><b>{escape(section.title)}</b>{note}</a>'
        f"{f'<ul>{parts}</ul>' if parts else ''}</li>"
    )


def _scripts() -> str:
    own = "\n".join(files(__package__).joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    known = {
        "DARK_COLOURS": replacements(DARK), "CATEGORIES": [spoken(name) for name in CATEGORIES],
        "PHASES": [spoken(name) for name in PHASES], "SURFACE": LIGHT.surface,
        "CATEGORY_COLOURS": {spoken(name): colour for name, colour in LIGHT.categories.items()}, "TEXT": LIGHT.text,
        "ACCENT": LIGHT.accent, "GRID": LIGHT.grid, "PHASE_BAR": PHASE_BAR, "PHASE_LABEL": PHASE_LABEL,
        "LABELLED_SHARE": LABELLED_SHARE,
    }  # fmt: skip
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in known.items())
    return (
        f'<script type="text/plain" id="plotly">{_packed_plotly()}</script>\n'
        f'<script>\n"use strict";\n{constants}{own}</script>'
    )


@cache
def _packed_plotly() -> str:
    return packed(get_plotlyjs())


def card(body: str, *, key: str, title: str) -> str:
    """A section of the page: `body` is HTML, `key` its id, `title` plain text."""
    return (
        f'<section class="card" id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(title)}</h2>'
        f"{body}</section>"
    )


def fold(body: str, *, key: str, title: str, gist: str = "", opened: bool = False, more: str = "") -> str:
    """A part of a section that can be folded.

    Args:
        body: HTML.
        key: its id.
        title: plain text.
        gist: plain text that stays in sight beside the title when the part is folded.
        opened: whether the part is unfolded at first.
        more: further attributes of the element, as HTML.
    """
    return (
        f'<details class="part" id="{key}"{" open" if opened else ""}{more}><summary><h3>{escape(title)}</h3> '
        f'<span class="gist">{escape(gist)}</span></summary><div class="body">{body}</div></details>'
    )


def facts(pairs: Iterable[tuple[str, str]], kind: str = "facts") -> str:
    """A list of names and values, plain text both; `kind` is its class."""
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="{kind}">{listed}</dl>'


def next_step(command: str) -> str:
    """The command that follows, as a shell takes it; empty: nothing."""
    return f'<p>Next: <code class="command">{escape(command)}</code></p>' if command else ""


def code(name: str) -> str:
    """A module or an operator, which may break after each dot."""
    return f"<code>{escape(name).replace('.', '.<wbr>')}</code>"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], label: str, kind: str) -> str:
    """A table of HTML cells, the first cell of each row its header. A wide table scrolls sideways, also by keyboard.

    Args:
        headers: HTML, one for each column.
        rows: HTML, one cell for each column.
        label: the caption, plain text.
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
    """A figure that is drawn when it comes into sight; `label` describes it in words."""
    height = figure.layout.height
    return (
        f'<div class="figure" role="img" aria-label="{escape(label)}" style="height:{height}px" '
        f'data-figure="{packed(figure.to_json())}"><noscript>{escape(label)}</noscript></div>'
    )


def packed(text: str) -> str:
    """The text, deflated, in base64: much smaller, and free of markup."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def swatch(name: str) -> str:
    """A small square in the colour of a category, a phase, or another named colour of the theme."""
    return f'<span class="swatch" style="--swatch:var(--{name})"></span>'
