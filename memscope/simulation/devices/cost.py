"""Writer of the step time estimate in a trace, which `memscope.analysis.cost` reads. Needs no torch."""

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
    """Return the estimate that a trace stores, as JSON values; seconds are rounded to nanoseconds."""
    rows = [[*place, *counts, round(seconds, 9)] for place, (*counts, seconds) in done.sums.items()]
    return {"estimate": True, "assumed": sorted(assumed), "columns": list(COLUMNS), "rows": rows}


def transfer_seconds(device: Device, size_bytes: int) -> float:
    """Estimate the seconds of a copy to or from pinned host memory, while nothing else uses the link.

    Raises:
        UsageError: the speed of the device's link to the host is unknown.
    """
    rate = device.host_bytes_per_second
    if rate is None:
        raise UsageError(
            f'the copy speed between "{device.name}" and the host is unknown: choose a specific GPU (see '
            '"memscope devices"), or set host_bytes_per_second in the device file'
        )
    return size_bytes / rate
