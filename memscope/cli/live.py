"""`memscope profile --live`: a panel for each run while it goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from memscope.hooks.live_state import Forecast, LiveState, MemoryKind
from memscope.runs.plans import Report
from memscope.trace import CATEGORIES
from memscope.units import format_bytes

__all__ = ["live_panels", "panels"]

_BAR = 30
"""Characters of a bar that stands for the whole capacity."""
_KINDS: tuple[MemoryKind, ...] = (*CATEGORIES, "undecided", "unseen")
_WORDS: Mapping[MemoryKind, str] = {"undecided": "not decided yet", "unseen": "rounding, inside kernels"}
_RESTS_ON: Mapping[Forecast, str] = {
    "so far": "largest so far; no forecast in the first step",
    "estimate": "estimate: the first step, and the optimizer state it made",
    "seen": "seen: a whole step with optimizer state",
}


@contextmanager
def live_panels(labels: Sequence[str], console: Console) -> Iterator[Report]:
    """Show the runs while they go, and nothing after; gives what to call with what a run reports."""
    states: list[LiveState | None] = [None] * len(labels)
    with Live(panels(labels, states), console=console, transient=True) as screen:

        def report(index: int, done: int, total: int, state: LiveState | None) -> None:
            if state is not None:
                states[index] = state
                screen.update(panels(labels, states))

        yield report


def panels(labels: Sequence[str], states: Sequence[LiveState | None]) -> RenderableType:
    """A panel for each run that goes, a line for each that is over or has not told anything yet."""
    return Group(*(_shown(label, state) for label, state in zip(labels, states, strict=True)))


def _shown(label: str, state: LiveState | None) -> RenderableType:
    if state is None:
        return Text(f"{label}: starting", style="dim")
    if state.is_finished:
        return Text(f"{label}: done, peak {format_bytes(state.peak_bytes)}")
    where = f"step {state.step}, {state.phase}, micro-batch {state.micro_batch + 1} of {state.micro_batches}"
    done = f"{state.done} of {state.total} micro-batches done"
    return Panel(_table(state), title=Text(f"{label}: {where}"), subtitle=Text(done), title_align="left", expand=False)


def _table(state: LiveState) -> Table:
    """Every kind that holds memory, and the peak; shares are of the capacity, or of the forecast if there is none."""
    whole = state.capacity_bytes or max(state.forecast_bytes, 1)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for kind in _KINDS:
        size_bytes = state.memory.get(kind, 0)
        if size_bytes:
            share = size_bytes / whole
            words = _WORDS.get(kind, kind.replace("_", " "))
            table.add_row(words, format_bytes(size_bytes), f"{share:.1%}", _bar(share))
    share = state.allocated_bytes / whole
    table.add_row(Text("now", style="bold"), format_bytes(state.allocated_bytes), f"{share:.1%}", _bar(share))
    share = state.forecast_bytes / whole
    about = "~" if state.forecast == "estimate" else ""
    too_much, does_not_fit = ("", "") if state.capacity_bytes is None or share <= 1 else ("red", "; does not fit")
    table.add_row(
        Text("peak", style="bold"),
        Text(about + format_bytes(state.forecast_bytes), style=too_much),
        Text(f"{share:.1%}", style=too_much),
        Text(_RESTS_ON[state.forecast] + does_not_fit, style="dim"),
    )
    if state.capacity_bytes is not None:
        table.add_row("capacity", format_bytes(state.capacity_bytes))
    return table


def _bar(share: float) -> str:
    return "█" * min(_BAR, round(_BAR * share)) or "▏"
