"""Record the steps of a loop that uses accelerate.

Tried with accelerate 1.15.
"""

from __future__ import annotations

import os
from typing import Any

from memscope.integrations.packages import needed
from memscope.integrations.step_recording import StepRecording

__all__ = ["AccelerateRecorder"]

needed("accelerate", extra="accelerate")


class AccelerateRecorder:
    """A context manager around a loop: records optimizer steps, logs the peak of each, and writes a trace.

    The loop calls `step` once for each batch, as it does with the profiler of `accelerator.profile()`. The figures go
    through `accelerator.log` to every tracker. The trace is also written after an exception.

    In a distributed run the main process alone is recorded.
    """

    def __init__(
        self,
        accelerator: Any,
        model: Any,
        optimizer: Any = None,
        output: str | os.PathLike[str] = "train.trace.npz",
        *,
        steps: int | None = 10,
        overwrite: bool = False,
    ) -> None:
        """Prepare to record.

        Args:
            accelerator: the `accelerate.Accelerator`.
            model: the model, as `accelerator.prepare` returned it.
            optimizer: the optimizer, likewise, if it has state already.
            output: the trace file.
            steps: number of optimizer steps to record; None: all. Those after it run at full speed.
            overwrite: whether the file may exist.

        Raises:
            UsageError: `steps` is not a positive whole number. On entering: the file exists, or cannot be written.
        """
        self._accelerator, self._model = accelerator, model
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._recording = StepRecording(output, steps=steps, overwrite=overwrite)

    def __enter__(self) -> AccelerateRecorder:
        if self._accelerator.is_main_process:
            self._recording.begin(self._accelerator.unwrap_model(self._model), self._optimizer)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._recording.end(error)

    def step(self, number: int | None = None) -> None:
        """Log the peak of an optimizer step; without effect for a batch whose gradients are only accumulated.

        Args:
            number: the number of the step, as the loop gives it to `accelerator.log`.
        """
        if self._accelerator.sync_gradients and (peaks := self._recording.step()):
            self._accelerator.log(peaks, step=number)
