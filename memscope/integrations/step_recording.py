"""The recording of the first steps of a loop that somebody else runs."""

from __future__ import annotations

import atexit
import os
import sys

import torch
from torch import nn

from memscope.errors import UsageError
from memscope.hooks.saved import SavedRecorder
from memscope.hooks.step_peaks import StepPeaks

__all__ = ["StepRecording"]


class StepRecording:
    """Records from `begin` to the end of the last step that is wanted, or to `end`, and then writes the trace: once.

    A loop that fails without a call of `end` leaves its trace when it begins again, or when Python exits.
    """

    def __init__(self, output: str | os.PathLike[str], *, steps: int | None, overwrite: bool) -> None:
        """Prepare to record.

        Args:
            output: the trace file.
            steps: number of optimizer steps to record; None: all.
            overwrite: whether the file may exist.

        Raises:
            UsageError: `steps` is not a positive whole number.
        """
        if steps is not None and (type(steps) is not int or steps < 1):
            raise UsageError(f"steps={steps!r}: expected the number of optimizer steps to record, or None for all")
        self._output, self._overwrite, self._left = output, overwrite, steps
        self._running: tuple[SavedRecorder, StepPeaks] | None = None
        self._has_begun = False

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Begin to record; a recording that was begun before is ended, and none follows it.

        Raises:
            UsageError: the file exists or cannot be written, or another recorder is entered.
        """
        if self._has_begun:
            self._abandon()
            return
        saved = SavedRecorder(
            model, optimizer, output=self._output, overwrite=self._overwrite, name=type(model).__name__
        )
        recorder = saved.__enter__()
        self._has_begun = True
        device = next((parameter.device for parameter in model.parameters()), None)
        self._running = saved, StepPeaks(recorder, device)
        atexit.register(self._abandon)

    def step(self) -> dict[str, int]:
        """Note the end of a step; returns its peak as `StepPeaks.read` does, or nothing when no recording runs."""
        if self._running is None:
            return {}
        peaks = self._running[1].read()
        if self._left is not None:
            self._left -= 1
            if not self._left:
                self.end()
        return peaks

    def end(self, error: BaseException | None = None) -> None:
        """End the recording, if one runs, and write the trace; `error` is what ended the loop."""
        if self._running is None:
            return
        atexit.unregister(self._abandon)
        (saved, _), self._running = self._running, None
        saved.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _abandon(self) -> None:
        """End the recording of a loop that failed: an exception that nobody caught is what ended it."""
        self.end(getattr(sys, "last_value", None))
