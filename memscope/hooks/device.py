"""The interface between a recorder and the real device it watches."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from memscope.errors import UsageError
from memscope.hooks.allocations import Allocations
from memscope.hooks.moments import Moments
from memscope.trace import Trace

__all__ = ["DeviceWatch", "require_gpu", "watch_of"]

_WATCHES = {"cuda": "memscope.gpu.watch:AllocatorWatch"}
"""Device type → class that watches such a device, named rather than imported: `memscope.gpu` imports these hooks."""


class DeviceWatch(AbstractContextManager["DeviceWatch"], Protocol):
    """Watches the allocator of one real device while it is entered."""

    moments: Moments
    """The host's activity, filled in by a `StorageTracker`."""

    def synchronize(self) -> None:
        """Wait until the device has finished all submitted work."""

    def trace(
        self,
        seen: Allocations,
        *,
        modules: Sequence[str],
        ops: Sequence[str],
        meta: Mapping[str, Any],
        ran_out: bool | None,
    ) -> Trace:
        """The trace of the device's blocks, each with its owner among `seen`; called after leaving.

        `ran_out` says whether running out of memory ended the recording; None: it did if the last request that failed
        is of the last step.

        Raises:
            MemscopeError: nothing was recorded, or the recorded history contradicts itself.
        """


def watch_of(device: torch.device | None) -> DeviceWatch | None:
    """The watch for a device; None for a device without one, such as the CPU."""
    if device is None or device.type not in _WATCHES:
        return None
    watch: DeviceWatch = pkgutil.resolve_name(_WATCHES[device.type])(device)
    return watch


def require_gpu() -> None:
    """Check that PyTorch has a CUDA device.

    Raises:
        UsageError: it has none; the message explains how to simulate one.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            'cannot record on "cuda": PyTorch finds no CUDA device on this machine. '
            "Simulate a GPU: --device gpu, or one of memscope devices (in Python: memscope.simulate)"
        )
