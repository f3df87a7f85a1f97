"""The run stage: run a workload's prepared steps under a recorder."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from memscope.errors import MemscopeError
from memscope.hooks.live import LiveStates
from memscope.hooks.live_state import Tell
from memscope.hooks.recorder import Recorder
from memscope.strategies import Plan
from memscope.trace import Phase
from memscope.trace.notes import add_note
from memscope.workload.building import target_error
from memscope.workload.description import Workload
from memscope.workload.inference import Inference, run_inference
from memscope.workload.micro_batches import MicroBatch
from memscope.workload.running import StepObserver
from memscope.workload.split import sample_counts
from memscope.workload.step import Training, run_step

__all__ = ["MicroBatchProgress", "run_meta", "run_steps"]

MicroBatchProgress = Callable[[int, int], None]
"""`progress(micro-batches done, total micro-batches)`, over all steps."""


def run_meta(workload: Workload, plan: Plan, device: str, *, simulated: bool) -> dict[str, Any]:
    """The `meta` entries that describe a run whose plan has been applied."""
    samples = sample_counts(workload.batches[0])
    chosen = {strategy.name: dict(strategy.chosen) for strategy in plan.strategies if strategy.chosen}
    meta: dict[str, Any] = {
        "target": workload.name,
        "settings": workload.settings,
        "samples_per_step": samples[0] if len(samples) == 1 else None,
        "strategies": plan.specs,
        **({"chosen": chosen} if chosen else {}),
        "device": {"name": device, "simulated": simulated},
    }
    if workload.positions is not None:
        meta["positions"] = workload.positions
    for note in workload.notes:
        add_note(meta, note)
    return meta


def run_steps(
    running: Training | Inference,
    pieces: list[list[MicroBatch]],
    recorder: Recorder,
    progress: MicroBatchProgress | None,
    live: Tell | None = None,
) -> None:
    """Run one step for each item of `pieces` under a recorder.

    `progress` is called after each micro-batch, `live` when a phase begins and at the end.

    Raises:
        TargetError: the target's own code fails; its exception is the cause.
    """
    states = LiveStates(recorder, [len(step) for step in pieces], live) if live else None
    observer: StepObserver = recorder
    if progress or states:
        observer = _ReportingRecorder(recorder, sum(map(len, pieces)), progress, states)
    try:
        with recorder:
            for step in pieces:
                try:
                    if isinstance(running, Inference):
                        run_inference(running, step, observer)
                    else:
                        run_step(running, step, observer)
                except BaseException as error:
                    _leave_checkpoints(error)
                    raise
        if isinstance(observer, _ReportingRecorder):
            observer.finished()
    except (MemscopeError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise target_error(running.workload.name, error) from error


def _leave_checkpoints(error: BaseException) -> None:
    """Leave the regions of `torch.utils.checkpoint` in which an exception was raised.

    Up to PyTorch 2.11, the hooks of a region stay active while its frame is alive, and the traceback of a kept
    exception keeps the frame alive. PyTorch 2.13 closes the region itself.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == checkpoint.__module__:
            frame.clear()


class _ReportingRecorder:
    """A recorder that reports each micro-batch when the next one begins, and the state of the run at every phase."""

    def __init__(
        self, recorder: Recorder, total: int, progress: MicroBatchProgress | None, states: LiveStates | None
    ) -> None:
        self._recorder, self._total, self._progress, self._states = recorder, total, progress, states
        self._begun = self._micro_batch = 0
        self._last: Phase = "zero_grad"

    def phase(self, name: str, micro_batch: int) -> None:
        if name in ("forward", "inference"):
            if self._begun and self._progress:
                self._progress(self._begun, self._total)
            self._begun += 1
        self._recorder.phase(name, micro_batch)
        self._micro_batch = micro_batch
        if self._states:
            phase: Phase = name  # type: ignore[assignment]
            self._last = "inference" if phase == "inference" else "zero_grad"
            self._states.moved(phase, micro_batch, self._begun - 1)

    def inputs(self, data: Any) -> None:
        self._recorder.inputs(data)

    def finished(self) -> None:
        if self._progress:
            self._progress(self._total, self._total)
        if self._states:
            self._states.moved(self._last, self._micro_batch, self._total)
