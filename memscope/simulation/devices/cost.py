"""Making the estimate of step time that a trace keeps; `memscope.analysis.cost` reads it. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from memscope.analysis.cost import COLUMNS
from memscope.errors import UsageError
from memscope.simulation.devices.catalogue import Device

if TYPE_CHECKING:
    from memscope.hooks.work import WorkDone

__all__ = ["cost_table", "transfer_seconds"]


def cost_table(done: WorkDone, assumed: Collection[str]) -> dict[str, Any]:
    """What a trace keeps of an estimate, as JSON values; seconds to the nanosecond."""
    rows = [[*place, *counts, round(seconds, 9)] for place, (*counts, seconds) in done.sums.items()]
    return {"estimate": True, "assumed": sorted(assumed), "columns": list(COLUMNS), "rows": rows}


def transfer_seconds(device: Device, size_bytes: int) -> float:
    """Estimated seconds that copying to or from the host takes when nothing else uses the link; pinned host memory.

    Raises:
        UsageError: when the device's link to the host is not known.
    """
    rate = device.host_bytes_per_second
    if rate is None:
        raise UsageError(
            f'how fast "{device.name}" copies to the host is not known: choose a certain GPU ("memscope devices" lists '
            "them), or set host_bytes_per_second in the device file"
        )
    return size_bytes / rate
