"""Record the history of PyTorch's CUDA allocator while a recorder is entered.

Sources: torch/cuda/memory.py and torch/csrc/cuda/Module.cpp, PyTorch 2.6 to 2.15. PyTorch switches recording on and off
for all devices of the process; the watch reads the history of one device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from memscope.allocator.settings import AllocatorSettings
from memscope.errors import MemscopeError, UsageError
from memscope.gpu.joined import Recording, joined
from memscope.gpu.nvml import DriverMemory, driver_memory
from memscope.hooks.allocations import Allocations
from memscope.hooks.moments import Moments
from memscope.trace import Trace

__all__ = ["AllocatorWatch"]


class AllocatorWatch:
    """Records one device's allocator while it is entered.

    Attributes:
        moments: the host's activity, filled in by a `StorageTracker`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self.moments = Moments()
        self._before: dict[str, Any] = {}
        self._history: Recording | None = None
        self._driver: list[DriverMemory] = []

    def __enter__(self) -> AllocatorWatch:
        if torch.cuda.get_allocator_backend() != "native":
            raise UsageError(
                f'the allocator "{torch.cuda.get_allocator_backend()}" keeps no history: '
                "record with PyTorch's native allocator (backend:native in PYTORCH_CUDA_ALLOC_CONF)"
            )
        if torch._C._cuda_isHistoryEnabled():
            raise UsageError(
                "PyTorch is already recording its history of CUDA allocations, and it has only one: "
                "stop that recording first with torch.cuda.memory._record_memory_history(enabled=None)"
            )
        self._history = None
        self._driver = [self._asked_driver()]
        # PyTorch keeps these from one matrix product to the next. Freed here, they are recorded when allocated again.
        torch._C._cuda_clearCublasWorkspaces()
        _start_history()
        try:
            self._before = torch.cuda.memory._snapshot()
            _settings(self._before)
            self.moments.annotate_with(_annotation(), _block_annotation())
        except BaseException:
            torch.cuda.memory._record_memory_history(enabled=None)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._history = self._read(torch.cuda.memory._snapshot())
            self._driver.append(self._asked_driver())
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    @property
    def history(self) -> Recording:
        """The recorded history; available after leaving.

        Raises:
            MemscopeError: nothing was recorded.
        """
        if self._history is None:
            raise MemscopeError("nothing was recorded: the recorder was not entered and left")
        return self._history

    def trace(
        self,
        seen: Allocations,
        *,
        modules: Sequence[str],
        ops: Sequence[str],
        meta: Mapping[str, Any],
        ran_out: bool | None,
    ) -> Trace:
        """See `DeviceWatch.trace`."""
        meta = {**meta, **self._meta()}
        return joined(self.history, self.moments, seen, modules=modules, ops=ops, meta=meta, ran_out=ran_out)

    def _meta(self) -> dict[str, Any]:
        """The `meta` entries about the device and the driver, as JSON values."""
        before, after = self._driver
        return {
            "device": {"name": torch.cuda.get_device_name(self._device), "simulated": False},
            "driver": {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)},
            "reserved_before": sum(segment["total_size"] for segment in self.history.before),
        }

    def synchronize(self) -> None:
        """Wait until the device has finished all submitted work."""
        torch.cuda.synchronize(self._device)

    def _read(self, snapshot: dict[str, Any]) -> Recording:
        capacity = torch.cuda.get_device_properties(self._device).total_memory
        fraction = _memory_fraction(self._device)
        return Recording(
            before=self._segments(self._before),
            entries=snapshot["device_traces"][self._device],
            after=self._segments(snapshot),
            settings=_settings(self._before),
            capacity_bytes=capacity,
            limit_bytes=None if fraction is None else int(fraction * capacity),
        )

    def _segments(self, snapshot: dict[str, Any]) -> list[dict[str, Any]]:
        return [segment for segment in snapshot["segments"] if segment["device"] == self._device]

    def _asked_driver(self) -> DriverMemory:
        uuid = getattr(torch.cuda.get_device_properties(self._device), "uuid", None)
        if uuid is None:
            return DriverMemory(reason="this version of PyTorch does not provide the device's UUID")
        return driver_memory(str(uuid))


def _start_history() -> None:
    """Start recording with an empty history, without stacks and without a limit."""
    options: dict[str, Any] = {"context": None, "stacks": "python"}
    if "clear_history" in inspect.signature(torch.cuda.memory._record_memory_history).parameters:
        options["clear_history"] = True  # versions without this option always clear the history
    torch.cuda.memory._record_memory_history(enabled="all", **options)


def _annotation() -> Callable[[str], None] | None:
    """PyTorch's function that attaches a text to the thread's next allocations; None if this version has none."""
    return getattr(torch._C, "_cuda_setMemoryMetadata", None)


def _block_annotation() -> Callable[[int, str], None] | None:
    """A function that attaches a text to the live block at an address; None if this version of PyTorch has none.

    The call behind `torch.cuda.memory._annotate_tensor` (PyTorch 2.15) raises an error where the allocator has no live
    block, as for memory that came from another library.
    """
    annotate = getattr(torch._C, "_cuda_annotateMemory", None)
    if annotate is None:
        return None

    def annotate_block(address: int, text: str) -> None:
        with contextlib.suppress(RuntimeError):
            annotate(address, text)

    return annotate_block


def _settings(snapshot: dict[str, Any]) -> AllocatorSettings:
    return AllocatorSettings.parse(snapshot["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"])


def _memory_fraction(device: int) -> float | None:
    read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return None if read is None else float(read(device))
