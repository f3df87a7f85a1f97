"""What `torch.cuda` says about memory: the figures of the simulated allocator at any time.

Before the first step, while the target builds its model, the model's weights so far are all that is allocated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from memscope.allocator.replay import Replay, replay
from memscope.allocator.settings import AllocatorSettings
from memscope.hooks.allocations import Allocations
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.refusal import no_answer

__all__ = ["GpuMemory", "total_bytes"]


def total_bytes(device: Device) -> int:
    """Memory of a device as PyTorch reports it; a device without a limit has as much as an integer can say."""
    return sys.maxsize if device.capacity_bytes is None else device.capacity_bytes


class GpuMemory:
    """The memory of a simulated GPU.

    Attributes:
        seen: the allocations recorded so far; None until the recorder exists.
        built: returns the bytes of each weight made so far, while `seen` is None.
        cache_emptied: the number of events recorded before each call of `torch.cuda.empty_cache()`.
    """

    def __init__(self, device: Device, settings: AllocatorSettings) -> None:
        self.seen: Allocations | None = None
        self.built: Callable[[], list[int]] = list
        self.cache_emptied: list[int] = []
        self._device, self._settings = device, settings
        self._peaks_from = 0

    def answers(self) -> dict[str, Callable[..., Any]]:
        """Name of a function of `torch.cuda` and `torch.accelerator` → what it does."""
        reserved, peak_reserved = (
            self._statistic("reserved_bytes", "current"),
            self._statistic("reserved_bytes", "peak"),
        )
        resets = ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached")
        return {
            "empty_cache": self._empty_cache,
            "memory_allocated": self._statistic("allocated_bytes", "current"),
            "max_memory_allocated": self._statistic("allocated_bytes", "peak"),
            **dict.fromkeys(("memory_reserved", "memory_cached"), reserved),
            **dict.fromkeys(("max_memory_reserved", "max_memory_cached"), peak_reserved),
            "memory_stats": lambda device=None: _Statistics(self._statistics()),
            **dict.fromkeys(("mem_get_info", "get_memory_info"), lambda device=None: self._info()),
            **dict.fromkeys(resets, lambda device=None: self._reset_peaks()),
        }

    def _statistic(self, kind: str, figure: str) -> Callable[..., int]:
        return lambda device=None: self._statistics()[f"{kind}.all.{figure}"]

    def _info(self) -> tuple[int, int]:
        """Free and total bytes of the device: the CUDA context and the reserved segments are not free."""
        total = total_bytes(self._device)
        used = self._device.context_bytes + self._statistics()["reserved_bytes.all.current"]
        return max(0, total - used), total

    def _statistics(self) -> dict[str, int]:
        """The sums over both pools, named as in PyTorch. Source: torch.cuda.memory_stats, torch/cuda/memory.py."""
        run = self._replay()
        highest = reserved = 0
        for change in run.segment_events:  # within an event, a segment may come before another one goes
            reserved += change.change_bytes
            highest = max(highest, reserved) if change.event >= self._peaks_from else highest
        found: dict[str, int] = {}
        for kind, series in (
            ("allocated_bytes", run.allocated),
            ("active_bytes", run.active),
            ("requested_bytes", run.requested),
            ("reserved_bytes", run.reserved),
        ):
            changes = np.diff(series, prepend=0)
            found[f"{kind}.all.current"] = int(series[-1]) if len(series) else 0
            found[f"{kind}.all.peak"] = int(series[max(self._peaks_from - 1, 0) :].max(initial=0))
            found[f"{kind}.all.allocated"] = int(changes[changes > 0].sum())
            found[f"{kind}.all.freed"] = int(-changes[changes < 0].sum())
        found["reserved_bytes.all.peak"] = max(found["reserved_bytes.all.peak"], highest)
        return found

    def _empty_cache(self) -> None:
        self.cache_emptied.append(self._events())

    def _reset_peaks(self) -> None:
        self._peaks_from = self._events()

    def _events(self) -> int:
        if self.seen is None:
            return 0
        return len(self.seen.births) + sum(event >= 0 for event in self.seen.freed)

    def _replay(self) -> Replay:
        """Replay of the allocator over all events so far."""
        if self.seen is None:
            sizes = self.built()
            born, freed = list(range(len(sizes))), [-1] * len(sizes)
        else:
            sizes, born = [one.size_bytes for one in self.seen.births], [one.born for one in self.seen.births]
            freed = self.seen.freed
        columns = (np.array(column, dtype=np.int64) for column in (sizes, born, freed))
        return replay(*columns, settings=self._settings, cache_emptied=self.cache_emptied)


class _Statistics(dict[str, int]):
    """The result of `torch.cuda.memory_stats()`: a figure that is not modelled is an error, not zero."""

    def __missing__(self, key: str) -> int:
        raise no_answer(f'torch.cuda.memory_stats()["{key}"]', f"the figures known are {', '.join(self)}")

    def get(self, key: str, default: Any = None) -> Any:
        """The figure, as by subscription."""
        return self[key]
