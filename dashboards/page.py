"""One self-contained HTML page of traces: every run, and the differences between them. It fetches nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memscope.analysis.effects import Run, Table1
from memscope.dashboards.comparison_cards import comparison_sections, effects_section
from memscope.dashboards.head import page_head, targets_of
from memscope.dashboards.html import Section, html_page
from memscope.dashboards.run_card import Room, run_section
from memscope.errors import UsageError

__all__ = ["render_page", "run_sections"]

_MOST_POSITIONS = 2000
"""Events a timeline shows at once: about two for each pixel column. Zooming in shows others."""
_PAGE_POSITIONS = 8_000
"""Events that all timelines of a page show at first, together; one takes at most 150 bytes packed, which keeps a page
below 8 MB."""
_PAGE_HELD = 80_000
"""Events that a page of one run holds for zooming in; one takes about 20 bytes packed. Several runs share half as many,
because their numbers pack worse."""
_PAGE_ALLOCATIONS = 250_000
"""Allocations that a page of one run holds; several runs share half as many. One takes about 8 bytes packed, a few more
where sizes are arbitrary."""


def _no_progress(doing: str, done: int, total: int) -> None:
    """Shows nothing."""


def render_page(
    runs: Sequence[Run],
    table1: Table1 | None = None,
    baselines: Sequence[str] = (),
    more: Sequence[Section] = (),
    progress: Callable[[str, int, int], None] = _no_progress,
) -> str:
    """The whole page as HTML. Every text of a trace is escaped; the page works from a file, with no network.

    Args:
        runs: at least one; each gets a section, in this order. The first run is compared with each of the others.
        table1: effects of the strategies.
        baselines: what the strategies require of the baseline, in words.
        more: further sections, shown before the runs.
        progress: called with the current activity, the number of runs done, and the number of runs.

    Raises:
        UsageError: when there is no run, or a trace is empty.
    """
    if not runs:
        raise UsageError("a page needs at least one trace: none was given")
    targets = targets_of(runs)
    sections = comparison_sections(runs) if len(runs) > 1 else []
    if table1 is not None and table1.columns:
        sections.insert(1, effects_section(table1, baselines))
    shown = [*sections, *more, *run_sections(runs, progress)]
    return html_page(f"memscope: {targets}", targets, shown, page_head(runs))


def run_sections(runs: Sequence[Run], progress: Callable[[str, int, int], None] = _no_progress) -> list[Section]:
    """The sections of all runs of a page, which share the room that a page has.

    Raises:
        UsageError: when a trace is empty.
    """
    shared_by = 1 if len(runs) == 1 else 2 * len(runs)
    room = Room(
        positions=max(500, min(_MOST_POSITIONS, _PAGE_POSITIONS // len(runs))),
        held=max(8, _PAGE_HELD // shared_by),
        allocations=_PAGE_ALLOCATIONS // shared_by,
    )
    sections = []
    for index, run in enumerate(runs):
        progress(f"drawing {run.label}", index, len(runs))
        sections.append(run_section(run, f"run{index}", room, opened=len(runs) == 1))
    return sections
