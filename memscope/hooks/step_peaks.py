"""The peak of each step while a recording goes on, under the names that loggers show."""

from __future__ import annotations

import torch

from memscope.hooks.held import HeldMemory
from memscope.hooks.recorder import Recorder

__all__ = ["StepPeaks"]


class StepPeaks:
    """Reads the peak since the previous reading from a recorder.

    On a GPU each reading resets PyTorch's peak statistics of the device, which have no other way to give the peak of
    one step.
    """

    def __init__(self, recorder: Recorder, device: torch.device | None) -> None:
        """Prepare to read a recorder that has been entered; `device`: the GPU that it records, None without one."""
        self._held = HeldMemory(recorder.tracker.seen)
        self._device = device if recorder.is_on_gpu else None
        self._names: dict[str, int] = {}
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> dict[str, int]:
        """The peak since the previous reading, and what it consisted of, in bytes.

        `memory/peak_allocated` is the sum of the entries of the categories, `memory/parameter` and so on. A category
        has an entry since the first reading in which it is not zero. `memory/undecided` is memory without a category
        yet, such as the loss. On a GPU, `memory/unseen` is what the allocator allocated at its own peak beyond the
        tensors at theirs, and `memory/peak_reserved` is what it reserved; the CPU has no allocator that reserves, and
        neither entry.
        """
        at_peak = {str(kind): size for kind, size in self._held.look().at_peak.items()}
        allocated, reserved = sum(at_peak.values()), None
        if self._device is not None:
            tensors = allocated
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
            at_peak["unseen"] = max(0, allocated - tensors)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._names |= dict.fromkeys(at_peak, 0)
        return {
            "memory/peak_allocated": allocated,
            **({} if reserved is None else {"memory/peak_reserved": reserved}),
            **{f"memory/{name}": size for name, size in {**self._names, **at_peak}.items()},
        }
