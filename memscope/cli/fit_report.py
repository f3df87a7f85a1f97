"""The text output of `memscope fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.advisor.fit.fitting import DeviceFit, Evidence, Fitting
from memscope.cli.tables import print_table
from memscope.units import format_bytes, format_seconds

__all__ = ["print_fit"]

_MOST_SIMULATIONS = 12


def print_fit(console: Console, found: Fitting) -> None:
    """Print whether it fits, how much larger it may be, what would help, the evidence and the devices."""
    plan = f" with {found.strategies}" if found.strategies else ""
    console.print(Text(f"{found.target}{plan} on {found.device} ({format_bytes(found.capacity_bytes)})", style="bold"))
    _print_verdict(console, found)
    if found.changes:
        print_table(console, _changes(found))
    shown = _shown(found)
    print_table(console, _evidence(found, shown))
    if len(shown) < len(found.evidence):
        more = len(found.evidence) - len(shown)
        console.print(Text(f"{more} more simulations are in --json and --html", style="dim"))
    print_table(console, _devices(found))
    for note in found.notes:
        console.print(Text(f"Note: {note}"))
    for assumption in found.assumptions:
        console.print(Text(f"Assumed: {assumption}"))
    console.print()


def _print_verdict(console: Console, found: Fitting) -> None:
    peak = found.peak
    needs = (
        f"{str(found.asked.size).capitalize()} needs {format_bytes(peak.device)}: allocated "
        f"{format_bytes(peak.allocated)}, reserved {format_bytes(peak.reserved)}, CUDA context "
        f"{format_bytes(peak.device - peak.reserved)} (estimate)."
    )
    verdict, style = (found.margin.verdict, "bold green") if found.fits else ("does not fit", "bold red")
    console.print(Text.assemble((f"It {verdict}. ", style), needs))
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    length = "" if found.asked.size.seq_len is None else f" at {found.asked.size.seq_len:,} tokens"
    table.add_row(f"largest micro-batch{length}", str(found.micro_batch))
    if found.seq_len is not None:
        batch = found.asked.size.micro_batch
        table.add_row(f"longest context at micro-batch {batch:,}", str(found.seq_len))
    else:
        table.add_row("longest context", "not searched: the target's settings say no length")
    smallest = found.smallest_device
    table.add_row(
        "smallest listed device",
        f"{smallest.name} ({format_bytes(smallest.capacity_bytes)})" if smallest else "none of them holds it",
    )
    print_table(console, table, "columns")


def _changes(found: Fitting) -> Table:
    table = Table(title="Cheapest changes that make it fit")
    table.add_column("-s", overflow="fold")
    table.add_column("device must hold", justify="right", no_wrap=True)
    table.add_column("step (estimate)", justify="right", no_wrap=True)
    for change in found.changes:
        table.add_row(change.strategies, format_bytes(change.device_bytes), format_seconds(change.step_seconds))
    return table


def _shown(found: Fitting) -> list[Evidence]:
    """The simulations to print: all if they are few, else the size asked for and both sides of each boundary."""
    if len(found.evidence) <= _MOST_SIMULATIONS:
        return list(found.evidence)
    asked, batch, length = found.asked.size, found.micro_batch, found.seq_len
    told = {asked, *(replace(asked, micro_batch=value) for value in (batch.value, batch.next) if value)}
    if length is not None:
        told |= {replace(asked, seq_len=value) for value in (length.value, length.next) if value}
    return [one for one in found.evidence if one.size in told]


def _evidence(found: Fitting, shown: Sequence[Evidence]) -> Table:
    table = Table(title=f"Simulated on {found.device}")
    has_length = found.asked.size.seq_len is not None
    for heading in ("micro-batch", *(["tokens"] if has_length else []), "device must hold"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits")
    for one in shown:
        table.add_row(*_evidence_row(one, has_length), style="bold" if one == found.asked else None)
    return table


def _evidence_row(one: Evidence, has_length: bool) -> list[str]:
    length = [f"{one.size.seq_len:,}"] if has_length and one.size.seq_len is not None else []
    fits = "yes" if one.fits else "no: runs out of memory"
    return [f"{one.size.micro_batch:,}", *length, format_bytes(one.peak.device), fits]


def _devices(found: Fitting) -> Table:
    table = Table(title=f"Devices that hold {found.asked.size}")
    table.add_column("--device", no_wrap=True)
    for heading in ("memory", "device must hold"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits")
    for device in found.devices:
        table.add_row(*_device_row(device))
    return table


def _device_row(device: DeviceFit) -> list[str]:
    needed = "not known" if device.device_bytes is None else format_bytes(device.device_bytes)
    return [device.name, format_bytes(device.capacity_bytes), needed, "yes" if device.fits else "no"]
