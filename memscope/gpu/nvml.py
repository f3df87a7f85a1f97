"""A device's memory as the driver counts it: the total, this process and other processes. Read through NVML."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["DriverMemory", "driver_memory", "has_gpu"]


@dataclass(frozen=True)
class DriverMemory:
    """A device's memory in bytes, as shown by nvidia-smi. None: not known; `reason` says why."""

    total_bytes: int | None = None
    used_bytes: int | None = None
    """Used by all processes. Drivers before 510 include their own reserved memory."""
    process_bytes: int | None = None
    """Used by this process: memory reserved by its allocators, the CUDA context, and memory of libraries."""
    others_bytes: int | None = None
    """Used by other processes."""
    reason: str = ""


def driver_memory(uuid: str, pid: int | None = None, library: Any = None) -> DriverMemory:
    """Query the driver. A missing library, driver, permission or process becomes a `reason`, not an error.

    Args:
        uuid: the device's UUID, with or without the prefix `GPU-` (`torch.cuda.get_device_properties().uuid`).
        pid: ID of the process to count separately; None: this process.
        library: NVML's Python module; None: `pynvml` of the package nvidia-ml-py.
    """
    if library is None:
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return DriverMemory(reason="the package nvidia-ml-py, which queries the driver, is not installed")
    try:
        with _initialized(library):
            handle = library.nvmlDeviceGetHandleByUUID(_full(uuid))
            return _asked(library, handle, os.getpid() if pid is None else pid)
    except (library.NVMLError, OSError, AttributeError) as error:
        return DriverMemory(reason=f"the driver did not answer: {error}")


def has_gpu() -> bool:
    """Whether the driver shows a GPU to this process. PyTorch is not asked: it may be a build without CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        library = importlib.import_module("pynvml")
        with _initialized(library):
            return bool(library.nvmlDeviceGetCount())
    except Exception:  # no library, no driver, or no permission
        return False


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
        return DriverMemory(total, used, reason=f"the driver does not list processes: {error}")
    own = taken.get(pid)
    if pid not in taken:
        reason = f"the driver does not list process {pid}: inside a container, the driver may use another process ID"
        return DriverMemory(total, used, reason=reason)
    if own is None:
        return DriverMemory(total, used, reason="the driver does not report the memory of each process")
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
    """Bytes of each process that computes on the device, by process ID."""
    taken: dict[int, int | None] = {}
    for process in library.nvmlDeviceGetComputeRunningProcesses(handle):
        taken[process.pid] = process.usedGpuMemory
    return taken
