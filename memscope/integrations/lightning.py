"""Record the steps of a Trainer of Lightning (the package `lightning`, or else `pytorch_lightning`).

Tried with Lightning 2.6 (lightning/pytorch/callbacks/callback.py).
"""

from __future__ import annotations

import os
from typing import Any

from memscope.integrations.packages import needed
from memscope.integrations.step_recording import StepRecording

__all__ = ["LightningRecorder"]

_Callback: Any = needed("lightning.pytorch", "pytorch_lightning", extra="lightning").Callback


class LightningRecorder(_Callback):  # type: ignore[misc]
    """A callback that records optimizer steps, logs the peak of each, and writes a trace, also after an exception.

    The figures go to `log_metrics` of every logger of the trainer, as those of Lightning's `DeviceStatsMonitor` do, not
    through `self.log`, which makes a tensor of each on the device and rounds it to float32.

    In a distributed run the main process alone is recorded.
    """

    def __init__(
        self, output: str | os.PathLike[str] = "train.trace.npz", *, steps: int | None = 10, overwrite: bool = False
    ) -> None:
        """Prepare to record.

        Args:
            output: the trace file.
            steps: number of optimizer steps to record; None: all. Those after it run at full speed.
            overwrite: whether the file may exist.

        Raises:
            UsageError: `steps` is not a positive whole number. When training begins: the file exists, or cannot be
                written.
        """
        self._recording = StepRecording(output, steps=steps, overwrite=overwrite)
        self._global_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to record."""
        self._global_step = trainer.global_step
        if trainer.is_global_zero:
            optimizers = trainer.optimizers
            self._recording.begin(pl_module, optimizers[0] if len(optimizers) == 1 else None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *about: Any) -> None:
        """Log the peak of an optimizer step, which may take several batches."""
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        if peaks := self._recording.step():
            for logger in trainer.loggers:
                # The number under which Lightning logs the losses of this batch, and its own monitors log theirs.
                logger.log_metrics(peaks, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the trace up to the exception."""
        self._recording.end(exception)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the trace."""
        self._recording.end()
