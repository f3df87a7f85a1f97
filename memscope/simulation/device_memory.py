"""From the bytes a step asks for to the bytes a device gives.

Kernels' workspaces, blocks, segments, and where memory runs out.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import torch

from memscope.simulation.allocator import AllocatorSettings, OutOfMemory, Replay, replay
from memscope.simulation.devices import Device
from memscope.simulation.workspaces import OPERATORS, KernelSettings, Workspace, describe, workspaces_for
from memscope.trace import CATEGORIES, PHASES, Trace

__all__ = ["KernelWorkspaces", "on_device"]


class KernelWorkspaces:
    """What kernels take inside themselves on a device: `workspaces(func, args, kwargs)`, for the PyTorch at hand.

    Attributes:
        estimated: names of the workspaces met whose size is not exactly known.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._version = _torch_version()
        self._settings = KernelSettings.from_environment(
            os.environ, deterministic=torch.are_deterministic_algorithms_enabled()
        )
        self.estimated: set[str] = set()

    def covers(self, name: str) -> bool:
        """Whether an operator, named with its overload, may take any."""
        return name.rpartition(".")[0] in OPERATORS

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Workspace]:
        """The workspaces one call of an operator takes."""
        found = workspaces_for(str(func), describe(func, args, kwargs), self._device, self._version, self._settings)
        self.estimated.update(workspace.name for workspace in found if workspace.estimate)
        return found


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def on_device(trace: Trace, device: Device, settings: AllocatorSettings) -> Trace:
    """The trace with the blocks and the reserved memory that a device's allocator would give it.

    Where the device is too small, `meta["out_of_memory"]` says when and by what it runs out, and the trace goes on as
    if it were not: so it still shows what would be needed.
    """
    capped = _replayed(trace, device, settings, device.allocatable_bytes)
    given = _replayed(trace, device, settings, None) if capped.oom else capped
    meta = {
        **trace.meta,
        "capacity": device.capacity_bytes,
        "context": device.context_bytes,
        "peak_reserved": given.peak_reserved,
        "out_of_memory": _described(trace, capped, capped.oom) if capped.oom else None,
    }
    return dataclasses.replace(trace, size=given.block_sizes, reserved=given.reserved, meta=meta)


def _replayed(trace: Trace, device: Device, settings: AllocatorSettings, capacity_bytes: int | None) -> Replay:
    total = device.capacity_bytes if capacity_bytes is not None else None
    return replay(
        trace.requested, trace.born, trace.freed, settings=settings, capacity_bytes=capacity_bytes, device_bytes=total
    )


def _described(trace: Trace, run: Replay, oom: OutOfMemory) -> dict[str, Any]:
    """The request that failed and what there was, as JSON values."""
    index = run.failed_allocation
    assert index is not None, "a replay that ran out knows by which allocation"
    return {
        "event": oom.event,
        "step": int(trace.step[index]),
        "micro_batch": int(trace.micro_batch[index]),
        "phase": PHASES[int(trace.phase[index])],
        "module": trace.modules[int(trace.module[index])],
        "op": trace.ops[int(trace.op[index])],
        "category": CATEGORIES[int(trace.category[index])],
        "requested": oom.requested_bytes,
        "allocated": oom.allocated_bytes,
        "reserved": oom.reserved_bytes,
        "largest_free": oom.largest_free_bytes,
        "limit": oom.limit_bytes,
        "by_category": _alive_by_category(trace, run, oom.event),
    }


def _alive_by_category(trace: Trace, run: Replay, event: int) -> dict[str, int]:
    alive = (trace.born < event) & ((trace.freed < 0) | (trace.freed >= event))
    sizes = np.bincount(trace.category[alive], weights=run.block_sizes[alive], minlength=len(CATEGORIES))
    return {category: int(size) for category, size in zip(CATEGORIES, sizes, strict=True)}
