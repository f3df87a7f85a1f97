"""Record the steps of a Trainer of transformers, or of one derived from it, such as TRL's.

Tried with transformers 5.23; the events are the same since 4.48 (src/transformers/trainer_callback.py).
"""

from __future__ import annotations

import os
from typing import Any

from memscope.integrations.packages import needed
from memscope.integrations.step_recording import StepRecording

__all__ = ["TrainerRecorder"]

_transformers = needed("transformers", extra="transformers")
_Callback: Any = _transformers.TrainerCallback


class TrainerRecorder(_Callback):  # type: ignore[misc]
    """A callback that records optimizer steps, logs the peak of each, and writes a trace.

    The figures go through `Trainer.log`: into `trainer.state.log_history`, and to the callbacks of TensorBoard, W&B and
    others. Entered as a context manager, the recorder adds itself to the trainer, and on leaving writes the trace also
    after an exception. A Trainer tells its callbacks of no exception: added with `trainer.add_callback` alone, a
    recorder writes the trace of a failed training only when Python exits.

    In a distributed run the main process alone is recorded.
    """

    def __init__(
        self,
        trainer: Any,
        output: str | os.PathLike[str] = "train.trace.npz",
        *,
        steps: int | None = 10,
        overwrite: bool = False,
    ) -> None:
        """Prepare to record a trainer.

        Args:
            trainer: the `transformers.Trainer`.
            output: the trace file.
            steps: number of optimizer steps to record; None: all. Those after it run at full speed.
            overwrite: whether the file may exist.

        Raises:
            UsageError: `steps` is not a positive whole number. When training begins: the file exists, or cannot be
                written.
        """
        self._trainer = trainer
        self._recording = StepRecording(output, steps=steps, overwrite=overwrite)

    def __enter__(self) -> TrainerRecorder:
        self._trainer.add_callback(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._trainer.remove_callback(self)
        self._recording.end(error)

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Begin to record."""
        if state.is_world_process_zero:
            self._recording.begin(about["model"], getattr(about["optimizer"], "optimizer", about["optimizer"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Log the peak of an optimizer step."""
        if peaks := self._recording.step():
            logs_too = control.should_log
            # Not as the trainer overrides it: TRL's trainers then log, and forget, what they have averaged so far.
            _transformers.Trainer.log(self._trainer, peaks)
            control.should_log = logs_too  # logging withdraws the request to log the loss of this step

    def on_train_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Write the trace."""
        self._recording.end()
