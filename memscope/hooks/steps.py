"""Run a workload's steps under a recorder: what simulation and measurement have in common."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memscope.errors import MemscopeError, TargetError, UsageError
from memscope.hooks.recorder import Recorder
from memscope.strategies import Plan
from memscope.workload import MicroBatch, StepObserver, Training, Workload, micro_batches, run_step

__all__ = ["Progress", "prepare_steps", "record_steps", "run_meta", "target_error", "where"]

Progress = Callable[[int, int], None]
"""`progress(micro-batches done, micro-batches in all)`, over all steps."""

_OWN_FOLDER = str(Path(__file__).parents[1])
_SHIPPED_TARGETS = str(Path(_OWN_FOLDER) / "targets")
_TORCH_FOLDER = str(Path(torch.__file__).parent)


def prepare_steps(workload: Workload, steps: int) -> list[list[MicroBatch]]:
    """The micro-batches of each step, on the host.

    Every step takes the first batch, so that the second step equals the first but for the optimizer state that is there
    by then.

    Raises:
        UsageError: when there is no data, no step, or a batch cannot be split as the plan says.
    """
    if steps < 1:
        raise UsageError(
            f"{steps} steps were asked for: at least one is needed, and two to see a step with optimizer state"
        )
    if not (hasattr(workload.batches, "__len__") and hasattr(workload.batches, "__getitem__")):
        raise UsageError(
            f'the batches of "{workload.name}" are a {type(workload.batches).__name__}, not a sequence: '
            "give a list, for example [next(iter(loader))]"
        )
    if not len(workload.batches):
        raise UsageError(f'"{workload.name}" has no batch to train on')
    return [micro_batches(workload, workload.batches[0]) for _ in range(steps)]


def run_meta(workload: Workload, plan: Plan, device: str, *, simulated: bool) -> dict[str, Any]:
    """What a trace keeps of the run it came from."""
    return {
        "target": workload.name,
        "settings": workload.settings,
        "strategies": plan.specs,
        "device": {"name": device, "simulated": simulated},
    }


def record_steps(
    workload: Workload,
    pieces: list[list[MicroBatch]],
    training: Training,
    recorder: Recorder,
    progress: Progress | None,
) -> None:
    """Run one step for each item of `pieces` under a recorder.

    Raises:
        TargetError: when the target's own code fails; its error is the cause.
    """
    observer: StepObserver = _Counted(recorder, sum(map(len, pieces)), progress) if progress else recorder
    try:
        with recorder:
            for step in pieces:
                run_step(training, step, observer)
        if isinstance(observer, _Counted):
            observer.finished()
    except MemscopeError:
        raise
    except Exception as error:
        raise target_error(workload.name, error) from error


class _Counted:
    """A recorder that reports each micro-batch when the next one begins."""

    def __init__(self, recorder: Recorder, total: int, progress: Progress) -> None:
        self._recorder, self._total, self._progress = recorder, total, progress
        self._begun = 0

    def phase(self, name: str, micro_batch: int) -> None:
        if name == "forward":
            if self._begun:
                self._progress(self._begun, self._total)
            self._begun += 1
        self._recorder.phase(name, micro_batch)

    def inputs(self, data: Any) -> None:
        self._recorder.inputs(data)

    def finished(self) -> None:
        self._progress(self._total, self._total)


def target_error(name: str, error: Exception) -> TargetError:
    """The target's own error as a message that names the line of the target's code it came from."""
    return TargetError(f'"{name}" failed: {type(error).__name__}: {_first_line(error)}{where(error)}')


def where(error: BaseException) -> str:
    """Where an error came from, as ` (at file:line, in function: code)`.

    The innermost line that is neither PyTorch's nor memscope's own; empty if there is none.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(_SHIPPED_TARGETS)
        or not frame.filename.startswith((_OWN_FOLDER, _TORCH_FOLDER, "<"))
    ]
    return f" (at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line})" if frames else ""


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
