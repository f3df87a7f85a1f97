"""Conversion of the bytes a step requests into the memory a device's allocator uses.

Covers workspaces of kernels, blocks, segments, and the point where memory runs out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memscope.allocator.releases import AGE_OF_BLOCK, release_text
from memscope.allocator.replay import Replay, replay
from memscope.allocator.report import OutOfMemory
from memscope.allocator.settings import AllocatorSettings
from memscope.allocator.traced import cache_emptied_in
from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.kernel_results import OWN_ORDER
from memscope.simulation.cuda.workspace_call import KernelSettings, describe
from memscope.simulation.cuda.workspaces import OPERATORS, workspaces_for
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.signature import describe_call
from memscope.trace import CATEGORIES, PHASES, Trace
from memscope.trace.notes import add_note
from memscope.units import format_bytes

__all__ = ["SMALL_SEGMENT_BYTES", "KernelWorkspaces", "least_reserved", "on_device"]

SMALL_SEGMENT_BYTES = 2 * 2**20
"""Bytes of a segment for small blocks: kSmallBuffer in c10/cuda/CUDACachingAllocator.cpp."""


class KernelWorkspaces:
    """The kernel workspace model of a device, for the installed PyTorch: `workspaces(func, args, kwargs)`.

    Attributes:
        estimated: names of the workspaces encountered whose sizes are estimates.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._version = _torch_version()
        self._settings = KernelSettings.from_environment(
            os.environ, deterministic=torch.are_deterministic_algorithms_enabled()
        )
        self.estimated: set[str] = set()
        self._known: dict[Any, list[Workspace]] = {}

    def covers(self, name: str) -> bool:
        """Whether an operator, named with its overload, may take workspaces."""
        return name.rpartition(".")[0] in OPERATORS

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Workspace]:
        """Return the workspaces that one call of an operator takes; those of equal calls are the same."""
        parts: list[Any] = [id(func)]  # operators live as long as the process, and hash slowly
        key = tuple(parts) if describe_call(args, kwargs, parts, []) else None
        known = self._known.get(key) if key else None
        if known is None:
            known = self._called(func, args, kwargs)
            if key:
                self._known[key] = known
        return known

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Workspace]:
        found = workspaces_for(str(func), describe(func, args, kwargs), self._device, self._version, self._settings)
        self.estimated.update(workspace.name for workspace in found if workspace.estimate)
        return found

    def has_own_order(self, name: str) -> bool:
        """Whether an operator, named with its overload, may create its results in another order or on the host."""
        return name in OWN_ORDER

    def born(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        """Indices of the results that one call creates on the device, in order; None: all, as they are returned."""
        return OWN_ORDER[str(func)](describe(func, args, kwargs), self._version)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def on_device(trace: Trace, device: Device, settings: AllocatorSettings, cache_emptied: Sequence[int] = ()) -> Trace:
    """Return the trace with the block sizes and reserved bytes of a device's allocator.

    If the device is too small, `meta["out_of_memory"]` describes the request that fails, and the sizes assume unlimited
    memory. `cache_emptied` lists the events before which the target calls `torch.cuda.empty_cache()`.
    """
    capped = _replayed(trace, device, settings, device.allocatable_bytes, cache_emptied)
    given = _replayed(trace, device, settings, None, cache_emptied) if capped.oom else capped
    meta = {
        **trace.meta,
        "capacity": device.capacity_bytes,
        "context": device.context_bytes,
        "allocator": {"settings": _values(settings), "cache_emptied": list(cache_emptied)},
        "peak_reserved": given.peak_reserved,
        "out_of_memory": _described(trace, capped, capped.oom) if capped.oom else None,
    }
    if settings.version is not None and settings.release < AGE_OF_BLOCK and not settings.expandable_segments:
        add_note(
            meta,
            f"PyTorch {settings.version} takes the lowest address of several cached blocks of equal size, and "
            "addresses are not known: this simulation takes the oldest segment, so reserved memory may differ",
        )
    if not capped.oom and settings.garbage_collection_threshold is None:
        _note_retries(meta, trace, capped, cache_emptied)
    return dataclasses.replace(trace, size=given.block_sizes, reserved=given.reserved, meta=meta)


def _note_retries(meta: dict[str, Any], trace: Trace, run: Replay, cache_emptied: Sequence[int]) -> None:
    """Note that the allocator ran out of memory, released cached segments and succeeded at the second attempt."""
    released: dict[int, int] = {}
    for change in run.segment_events:
        if change.change_bytes < 0 and change.event not in cache_emptied:
            released[change.event] = released.get(change.event, 0) - change.change_bytes
    if not released:
        return
    event, size_bytes = next(iter(released.items()))
    index = int(np.flatnonzero(trace.born == event)[0])  # only an allocation makes the allocator release memory
    times = f", and {len(released) - 1} times more" if len(released) > 1 else ""
    add_note(
        meta,
        f"the device was full in step {trace.step[index]}, {PHASES[int(trace.phase[index])]}{times}: the allocator "
        f"released {format_bytes(size_bytes)} of its cache and went on, as PyTorch's does (num_alloc_retries). "
        "This takes time, and a small change may make the run fail",
    )


def _values(settings: AllocatorSettings) -> dict[str, Any]:
    """The settings as JSON values."""
    values = {**dataclasses.asdict(settings), "version": release_text(settings.release)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def least_reserved(trace: Trace, settings: AllocatorSettings) -> int:
    """A limit on reserved bytes under which a run completes, found by bisection.

    The limit may be below the peak without one: before the allocator gives up, it returns cached segments to the driver
    and tries again. The search replays the whole run, the target's own calls of `empty_cache` included, for each
    candidate, and halves the range between a limit that fails and one that is enough.

    The result is enough; a limit that is lower by at most `SMALL_SEGMENT_BYTES` fails, or is below the peak allocated
    bytes. The result need not be the smallest: under a lower limit, caches are emptied at other moments, which may
    leave less fragmentation, so that a run may complete although it fails under a higher limit.
    """
    free = replay(trace.requested, trace.born, trace.freed, settings=settings, cache_emptied=cache_emptied_in(trace))
    least, most = free.peak_allocated - 1, free.peak_reserved
    while most - least > SMALL_SEGMENT_BYTES:
        half = (most - least) // SMALL_SEGMENT_BYTES // 2 * SMALL_SEGMENT_BYTES
        tried = most - max(half, SMALL_SEGMENT_BYTES)
        peak = free.peak_reserved_within(tried)
        if peak is None:
            least = tried
        else:
            most = peak  # a limit at the peak of this run would change nothing in it
    return most


def _replayed(
    trace: Trace,
    device: Device,
    settings: AllocatorSettings,
    capacity_bytes: int | None,
    cache_emptied: Sequence[int],
) -> Replay:
    return replay(
        trace.requested,
        trace.born,
        trace.freed,
        settings=settings,
        capacity_bytes=capacity_bytes,
        device_bytes=device.capacity_bytes if capacity_bytes is not None else None,
        cache_emptied=cache_emptied,
    )


def _described(trace: Trace, run: Replay, oom: OutOfMemory) -> dict[str, Any]:
    """The request that failed and the memory in use at that moment, as JSON values."""
    index = run.failed_allocation
    assert index is not None, "a replay that ran out of memory has a failed allocation"
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
