"""What the driver sees of a device's memory: this process, the others, and how much there is. Read through NVML."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["DriverMemory", "driver_memory"]


@dataclass(frozen=True)
class DriverMemory:
    """A device's memory in bytes, as nvidia-smi shows it; None: not known, and `reason` says why."""

    total_bytes: int | None = None
    used_bytes: int | None = None
    """By all processes. What the driver keeps for itself counts only where it does not tell it apart (before 510)."""
    process_bytes: int | None = None
    """By this process: what its allocators hold, the CUDA context, and what libraries took."""
    others_bytes: int | None = None
    """By the other processes."""
    reason: str = ""


def driver_memory(uuid: str, pid: int | None = None, library: Any = None) -> DriverMemory:
    """Ask the driver; whatever is missing (library, driver, permission, the process itself) is a reason, not an error.

    Args:
        uuid: of the device, with or without `GPU-` before it (`torch.cuda.get_device_properties().uuid`).
        pid: of the process to be told apart; None: this one.
        library: NVML's Python module; None: `pynvml` of the package nvidia-ml-py.
    """
    if library is None:
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return DriverMemory(reason="the package nvidia-ml-py, which asks the driver, is not installed")
    try:
        with _initialized(library):
            handle = library.nvmlDeviceGetHandleByUUID(_full(uuid))
            return _asked(library, handle, os.getpid() if pid is None else pid)
    except (library.NVMLError, OSError, AttributeError) as error:
        return DriverMemory(reason=f"the driver did not answer: {error}")


@contextmanager
def _initialized(library: Any) -> Iterator[None]:
    library.nvmlInit()
    try:
        yield
    finally:
        library.nvmlShutdown()


def _full(uuid: str) -> str:
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _asked(library: Any, handle: Any, pid: int) -> DriverMemory:
    total, used = _totals(library, handle)
    try:
        taken = _by_process(library, handle)
    except library.NVMLError as error:
        return DriverMemory(total, used, reason=f"the driver does not tell processes apart: {error}")
    own = taken.get(pid)
    if pid not in taken:
        reason = f"the driver lists no process {pid}: inside a container it may know it by another number"
        return DriverMemory(total, used, reason=reason)
    if own is None:
        return DriverMemory(total, used, reason="the driver does not tell how much each process takes")
    return DriverMemory(total, used, own, max(0, used - own))


def _totals(library: Any, handle: Any) -> tuple[int, int]:
    version = getattr(library, "nvmlMemory_v2", None)
    if version is not None:
        try:
            memory = library.nvmlDeviceGetMemoryInfo(handle, version=version)
        except library.NVMLError:  # a driver before 510
            memory = library.nvmlDeviceGetMemoryInfo(handle)
    else:
        memory = library.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.total), int(memory.used)


def _by_process(library: Any, handle: Any) -> dict[int, int | None]:
    """Bytes by process; a process that computes and draws is listed twice, with the same bytes."""
    taken: dict[int, int | None] = {}
    for process in library.nvmlDeviceGetComputeRunningProcesses(handle):
        taken[process.pid] = process.usedGpuMemory
    return taken
