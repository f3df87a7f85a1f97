"""Run a workload's steps under a recorder: what simulation and measurement have in common."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from memscope.errors import MemscopeError, TargetError, UsageError, where
from memscope.hooks.live import LiveStates
from memscope.hooks.recorder import Recorder
from memscope.live import Tell
from memscope.strategies import Plan
from memscope.trace import Phase
from memscope.workload import MicroBatch, StepObserver, Training, Workload, micro_batches, run_step, sample_counts

__all__ = [
    "Choose",
    "Progress",
    "build_workload",
    "prepare_steps",
    "record_steps",
    "run_meta",
    "target_error",
    "usable",
]

Progress = Callable[[int, int], None]
"""`progress(micro-batches done, micro-batches in all)`, over all steps."""


Choose = Callable[[list[MicroBatch]], list[MicroBatch]]
"""Which micro-batches of a step to run, out of all of them."""


def prepare_steps(workload: Workload, steps: int, choose: Choose = list) -> list[list[MicroBatch]]:
    """The micro-batches of each step, on the host: those that `choose` leaves of them.

    Every step takes the first batch, so that the second step equals the first but for the optimizer state that is there
    by then.

    Raises:
        UsageError: when there is no data, no step, or a batch cannot be split as the plan says.
    """
    if steps < 1:
        raise UsageError(
            f"{steps} steps were asked for: at least one is needed, and two to see a step with optimizer state"
        )
    usable(workload)
    if not len(workload.batches):
        raise UsageError(f'"{workload.name}" has no batch to train on')
    return [choose(micro_batches(workload, workload.batches[0])) for _ in range(steps)]


def run_meta(workload: Workload, plan: Plan, device: str, *, simulated: bool) -> dict[str, Any]:
    """What a trace keeps of the run it came from."""
    samples = sample_counts(workload.batches[0])
    return {
        "target": workload.name,
        "settings": workload.settings,
        "samples_per_step": samples[0] if len(samples) == 1 else None,
        "strategies": plan.specs,
        "device": {"name": device, "simulated": simulated},
    }


def record_steps(
    workload: Workload,
    pieces: list[list[MicroBatch]],
    training: Training,
    recorder: Recorder,
    progress: Progress | None,
    live: Tell | None = None,
) -> None:
    """Run one step for each item of `pieces` under a recorder.

    `progress` is called after each micro-batch, `live` when a phase begins and when all is done.

    Raises:
        TargetError: when the target's own code fails; its error is the cause.
    """
    states = LiveStates(recorder, [len(step) for step in pieces], live) if live else None
    observer: StepObserver = recorder
    if progress or states:
        observer = _Counted(recorder, sum(map(len, pieces)), progress, states)
    try:
        with recorder:
            for step in pieces:
                try:
                    run_step(training, step, observer)
                except BaseException as error:
                    _leave_checkpoints(error)
                    raise
        if isinstance(observer, _Counted):
            observer.finished()
    except MemscopeError:
        raise
    except (Exception, SystemExit) as error:
        raise target_error(workload.name, error) from error


def _leave_checkpoints(error: BaseException) -> None:
    """End the regions of `torch.utils.checkpoint` that a failure went through, so that whoever keeps it is not in them.

    Up to PyTorch 2.11 their hooks stay on for as long as the frame that holds them: 2.13 closes it.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == checkpoint.__module__:
            frame.clear()


class _Counted:
    """A recorder that reports each micro-batch when the next one begins, and the state of the run at every phase."""

    def __init__(self, recorder: Recorder, total: int, progress: Progress | None, states: LiveStates | None) -> None:
        self._recorder, self._total, self._progress, self._states = recorder, total, progress, states
        self._begun = self._micro_batch = 0

    def phase(self, name: str, micro_batch: int) -> None:
        if name == "forward":
            if self._begun and self._progress:
                self._progress(self._begun, self._total)
            self._begun += 1
        self._recorder.phase(name, micro_batch)
        self._micro_batch = micro_batch
        if self._states:
            phase: Phase = name  # type: ignore[assignment]
            self._states.moved(phase, micro_batch, self._begun - 1)

    def inputs(self, data: Any) -> None:
        self._recorder.inputs(data)

    def finished(self) -> None:
        if self._progress:
            self._progress(self._total, self._total)
        if self._states:
            self._states.moved("zero_grad", self._micro_batch, self._total)


def build_workload(build: Callable[[], Workload]) -> Workload:
    """What a target's `build` gives.

    Raises:
        TargetError: when it fails, or gives something else than a workload.
    """
    try:
        built: object = build()
    except MemscopeError:
        raise
    except (Exception, SystemExit) as error:
        raise target_error("the target", error) from error
    return usable(built)


def usable(built: object) -> Workload:
    """What `build` gave, when it is a workload that can be run.

    Raises:
        TargetError: when it is something else, or has no model.
        UsageError: when its batches are no sequence.
    """
    if not isinstance(built, Workload):
        what = "nothing" if built is None else f"a {type(built).__name__}"
        raise TargetError(f"build gave {what}, not a Workload: end it with  return Workload(model=..., ...)")
    if not isinstance(built.model, torch.nn.Module):
        raise TargetError(f'the model of "{built.name}" is a {type(built.model).__name__}: expected an nn.Module')
    if not (hasattr(built.batches, "__len__") and hasattr(built.batches, "__getitem__")):
        raise UsageError(
            f'the batches of "{built.name}" are a {type(built.batches).__name__}, not a sequence: '
            "give a list, for example [next(iter(loader))]"
        )
    return built


def target_error(name: str, error: BaseException) -> TargetError:
    """The target's own error as a message that names the line of the target's code it came from."""
    return TargetError(f'"{name}" failed: {type(error).__name__}: {_first_line(error)}{where(error)}')


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
