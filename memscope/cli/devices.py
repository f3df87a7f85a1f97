"""`memscope devices`."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from memscope.cli.next_command import FIRST_PROFILE, print_next
from memscope.cli.tables import print_table
from memscope.command.options import debug_option
from memscope.simulation.devices.catalogue import Device, all_devices
from memscope.units import format_bytes

__all__ = ["command"]


@click.command("devices")
@debug_option
def command() -> None:
    """List the devices that can be simulated.

    Memory is the total that PyTorch reports, sm the compute capability, TFLOP/s are dense peak rates, and GB/s is the
    bandwidth of the memory.
    """
    table = Table()
    for heading in ("--device", "name"):
        table.add_column(heading, no_wrap=heading == "--device", overflow="fold")
    for heading in ("memory", "sm", "TFLOP/s fp32", "fp16", "bf16", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=heading != "TFLOP/s fp32")
    for device in all_devices():
        table.add_row(*_row(device))
    console = Console(highlight=False)
    print_table(console, table)
    console.print("--device cpu runs the step for real; every other device is simulated, on any machine.")
    print_next(console, [*FIRST_PROFILE, "--device", "a100-40gb"])


def _row(device: Device) -> list[str]:
    memory = format_bytes(device.capacity_bytes) if device.capacity_bytes else "no limit"
    rates = [device.peak_flops_per_second.get(dtype) for dtype in ("fp32", "fp16", "bf16")]
    speed = device.bandwidth_bytes_per_second
    is_gpu = device.kind == "cuda"
    return [
        device.name,
        device.vendor_name,
        memory if is_gpu else "",
        "{}{}".format(*device.capability) if is_gpu else "",
        *(f"{rate / 1e12:.1f}" if rate else "" for rate in rates),
        f"{speed / 1e9:.0f}" if speed else "",
    ]
