"""`memscope devices`."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from memscope.simulation.devices.catalogue import Device, all_devices

__all__ = ["command"]


@click.command("devices")
def command() -> None:
    """List the devices that can be simulated.

    Memory is what PyTorch reports of it, TFLOP/s are dense peak rates, GB/s is the bandwidth of the memory.
    """
    table = Table()
    for heading in ("--device", ""):
        table.add_column(heading)
    for heading in ("memory", "sm", "TFLOP/s fp32", "fp16", "bf16", "GB/s"):
        table.add_column(heading, justify="right")
    for device in all_devices():
        table.add_row(*_row(device))
    console = Console(highlight=False)
    console.print(table)
    console.print("--device cpu runs for real; every other one is simulated, on any machine.")
    console.print("Next: memscope profile targets/llama2 --strategies lora,amp --device a100-40gb")


def _row(device: Device) -> list[str]:
    memory = f"{device.capacity_bytes / 2**30:.2f} GiB" if device.capacity_bytes else "no limit"
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
