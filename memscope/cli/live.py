"""`memscope profile --live`: a panel for each run in progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from memscope.cli.tables import NARROW
from memscope.hooks.live_state import Forecast, LiveState, MemoryKind
from memscope.runs.plans import Report
from memscope.trace import CATEGORIES
from memscope.units import format_bytes

__all__ = ["live_panels", "panels"]

_BAR = 30
"""Characters of a bar for the whole capacity, on a terminal that is wide enough."""
_BESIDE_THE_BAR = 50
"""Columns that the frame, the longest name, a size and a share take."""
_KINDS: tuple[MemoryKind, ...] = (*CATEGORIES, "undecided", "unseen")
_WORDS: Mapping[MemoryKind, str] = {"undecided": "not decided yet", "unseen": "rounding, inside kernels"}
_RESTS_ON: Mapping[Forecast, str] = {
    "so far": "peak so far; no forecast in the first step",
    "estimate": "estimate: first step plus optimizer state",
    "seen": "seen: a whole step with optimizer state",
}


@contextmanager
def live_panels(labels: Sequence[str], console: Console) -> Iterator[Report]:
    """Show the runs while they are in progress, and clear the screen after; yields the function that takes reports."""
    states: list[LiveState | None] = [None] * len(labels)
    with Live(panels(labels, states, console.width), console=console, transient=True) as screen:

        def report(index: int, done: int, total: int, state: LiveState | None) -> None:
            if state is not None:
                states[index] = state
                screen.update(panels(labels, states, console.width))

        yield report


def panels(labels: Sequence[str], states: Sequence[LiveState | None], width: int) -> RenderableType:
    """A panel for each run in progress, and a line for each run that is done or has not reported yet."""
    return Group(*(_shown(label, state, width) for label, state in zip(labels, states, strict=True)))


def _shown(label: str, state: LiveState | None, width: int) -> RenderableType:
    if state is None:
        return Text(f"{label}: starting", style="dim")
    if state.is_finished:
        return Text(f"{label}: done, peak {format_bytes(state.peak_bytes)}")
    phase = state.phase.replace("_", " ")
    where = f"{label}: step {state.step}, {phase}, micro-batch {state.micro_batch + 1} of {state.micro_batches}"
    done = f"{state.done} of {state.total} micro-batches done"
    if width < NARROW:
        return Group(Text(f"{where}; {done}", style="bold"), _table(state, 0), _forecast(state))
    table = Group(_table(state, min(_BAR, width - _BESIDE_THE_BAR)), _forecast(state))
    return Panel(table, title=Text(where), subtitle=Text(done), title_align="left", expand=False)


def _table(state: LiveState, bar: int) -> Table:
    """A row for each kind that holds memory, and the peak; shares are of the capacity, or of the forecast without it.

    A bar of `bar` characters stands for a share of 100 %.
    """
    whole = state.capacity_bytes or max(state.forecast_bytes, 1)
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)

    def row(name: str, size_bytes: int, style: str = "", about: str = "", *, has_bar: bool = True) -> None:
        share = size_bytes / whole
        size = Text(about + format_bytes(size_bytes), style=style)
        table.add_row(name, size, Text(f"{share:.1%}", style=style), _bar(share, bar) if has_bar and bar else "")

    for kind in _KINDS:
        if state.memory.get(kind):
            row(_WORDS.get(kind, kind.replace("_", " ")), state.memory[kind])
    row("[bold]now", state.allocated_bytes)
    about = "~" if state.forecast == "estimate" else ""
    row("[bold]peak", state.forecast_bytes, "red" if _is_too_much(state) else "", about, has_bar=False)
    if state.capacity_bytes is not None:
        table.add_row("capacity", format_bytes(state.capacity_bytes))
    return table


def _forecast(state: LiveState) -> Text:
    """The basis of the forecast of the peak, and whether the peak fits."""
    return Text(f"peak: {_RESTS_ON[state.forecast]}{'; does not fit' if _is_too_much(state) else ''}", style="dim")


def _is_too_much(state: LiveState) -> bool:
    return state.capacity_bytes is not None and state.forecast_bytes > state.capacity_bytes


def _bar(share: float, whole: int) -> str:
    return "█" * min(whole, round(whole * share)) or "▏"
