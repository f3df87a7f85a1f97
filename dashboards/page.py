"""One self-contained HTML page of traces: every run, and how they differ. Fetches nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from memscope.analysis.effects import Run, Table1
from memscope.dashboards.comparison_cards import comparison_cards, effects_card
from memscope.dashboards.html import html_page
from memscope.dashboards.run_card import run_card
from memscope.errors import UsageError

__all__ = ["render_page", "run_cards"]

Progress = Callable[[str, int, int], None]

_MOST_POSITIONS = 2000
"""Events a timeline shows at once: about two for each pixel column; where a reader zooms in, others."""
_PAGE_POSITIONS = 8_000
"""Events shared by all timelines of a page as they are at first; one takes at most some 150 bytes packed, and a page
stays under 8 MB."""
_PAGE_HELD = 80_000
"""Events held of a run for readers who zoom in; one takes some 20 bytes packed. Several runs share half as many, since
their numbers pack worse."""
_PAGE_ALLOCATIONS = 250_000
"""Allocations held of a run; several runs share half as many. One takes some 8 bytes packed, a few more where sizes are
arbitrary."""


def render_page(
    runs: Sequence[Run],
    table1: Table1 | None = None,
    baselines: Sequence[str] = (),
    more: Sequence[str] = (),
    progress: Progress = lambda *_: None,
) -> str:
    """The whole page as HTML. Every text of a trace is escaped; the page works from a file, with no network.

    Args:
        runs: at least one; each gets a section, in this order. The others are compared with the first.
        table1: effects of the strategies.
        baselines: what strategies asked of the baseline, in words.
        more: HTML of further cards, shown before the runs.
        progress: told what is being done, how many runs are done, of how many.

    Raises:
        UsageError: when there is no run, or a trace is empty.
    """
    if not runs:
        raise UsageError("a page needs at least one trace: none was given")
    targets = ", ".join(dict.fromkeys(str(run.trace.meta.get("target", "unnamed target")) for run in runs))
    cards = comparison_cards(runs) if len(runs) > 1 else []
    if table1 is not None and table1.columns:
        cards.insert(1, effects_card(table1, baselines))
    return html_page(f"memscope: {targets}", targets, [*cards, *more, *run_cards(runs, progress)])


def run_cards(runs: Sequence[Run], progress: Progress = lambda *_: None) -> list[str]:
    """The sections of all runs of a page, which share the room there is.

    Raises:
        UsageError: when a trace is empty.
    """
    positions = max(500, min(_MOST_POSITIONS, _PAGE_POSITIONS // len(runs)))
    shared_by = 1 if len(runs) == 1 else 2 * len(runs)
    held, kept = max(8, _PAGE_HELD // shared_by), _PAGE_ALLOCATIONS // shared_by
    cards = []
    for index, run in enumerate(runs):
        progress(f"drawing {run.label}", index, len(runs))
        cards.append(run_card(run, f"run{index}", positions, held, kept))
    return cards


if __name__ == "__main__":
    from memscope.dashboards.demo import write_page

    write_page(sys.argv[1:])
