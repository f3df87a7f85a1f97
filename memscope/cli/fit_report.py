"""The text output of `memscope fit`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.advisor.fit.fitting import DeviceFit, Evidence, Fitting, Size
from memscope.cli.tables import print_table
from memscope.units import format_bytes, format_seconds

__all__ = ["print_fit"]

_MOST_SIMULATIONS = 12
_LINES = "a device has the longest simulated length below its memory (its own kernels may differ)"


def print_fit(console: Console, found: Fitting) -> None:
    """Print whether it fits, how much larger it may be, what would help, the evidence and the devices."""
    plan = f" with {found.strategies}" if found.strategies else ""
    console.print(Text(f"{found.target}{plan} on {found.device} ({format_bytes(found.capacity_bytes)})", style="bold"))
    _print_verdict(console, found)
    if found.changes:
        print_table(console, _changes(found))
    if found.asked.size.seq_len is None:
        _print_micro_batches(console, found)
    else:
        print_table(console, _sizes(found))
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
        table.add_row("longest context", "not searched: no setting says a length")
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


def _sizes(found: Fitting) -> Table:
    """Memory over length and micro-batch, and where devices end; sizes that were not simulated stay empty."""
    cells = {one.size: one for one in found.evidence}
    batches = sorted({size.micro_batch for size in cells})
    lengths = sorted({size.seq_len or 0 for size in cells})
    table = Table(
        title=f"Memory that {found.device} must hold, by tokens and micro-batch",
        caption="× runs out of memory" + (f"; {_LINES}" if found.lines[1:] else ""),
    )
    table.add_column("tokens", justify="right", no_wrap=True)
    for batch in batches:
        table.add_column(f"micro-batch {batch:,}", justify="right")
    for length in lengths:
        row = [cells.get(Size(batch, length)) for batch in batches]
        table.add_row(f"{length:,}", *(_cell(one, is_asked=one == found.asked) for one in row))
    table.add_section()
    for device in found.lines[1:]:
        columns = [[cells[size] for size in cells if size.micro_batch == batch] for batch in batches]
        table.add_row(device.name, *(_longest_below(device, column) for column in columns), style="dim")
    return table


def _longest_below(device: DeviceFit, column: Sequence[Evidence]) -> str:
    """The longest of some simulated lengths that need less than the memory of a device."""
    below = [one.size.seq_len or 0 for one in column if one.peak.device <= device.capacity_bytes]
    return f"{max(below):,} tokens" if below else "none"


def _cell(one: Evidence | None, *, is_asked: bool) -> Text:
    if one is None:
        return Text()
    return Text(f"{format_bytes(one.peak.device)}{'' if one.fits else ' ×'}", style="bold" if is_asked else "")


def _print_micro_batches(console: Console, found: Fitting) -> None:
    """Print all simulations if they are few, else that of the size asked for and both sides of the boundary."""
    shown: Sequence[Evidence] = found.evidence
    if len(shown) > _MOST_SIMULATIONS:
        told = {found.asked.size.micro_batch, found.micro_batch.value, found.micro_batch.next}
        shown = [one for one in shown if one.size.micro_batch in told]
    table = Table(title=f"Simulated on {found.device}")
    for heading in ("micro-batch", "device must hold"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits")
    rows: list[tuple[int, tuple[str, str, str], str]] = []
    for one in shown:
        fits = "yes" if one.fits else "no: runs out of memory"
        cells = (f"{one.size.micro_batch:,}", format_bytes(one.peak.device), fits)
        rows.append((one.peak.device, cells, "bold" if one == found.asked else ""))
    for device in found.lines[1:]:
        cells = (device.name, format_bytes(device.capacity_bytes), "memory of the device")
        rows.append((device.capacity_bytes, cells, "dim"))
    for _, cells, style in sorted(rows, key=lambda row: row[0]):
        table.add_row(*cells, style=style)
    print_table(console, table)
    if len(shown) < len(found.evidence):
        more = len(found.evidence) - len(shown)
        console.print(Text(f"{more} more simulations are in --json and --html", style="dim"))


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
    fits = "not known" if device.device_bytes is None else "yes" if device.fits else "no"
    return [device.name, format_bytes(device.capacity_bytes), needed, fits]
