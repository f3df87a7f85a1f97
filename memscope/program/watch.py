"""Watch the present process: from its first import of PyTorch to the last step asked for."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from memscope.allocator.settings import AllocatorSettings
from memscope.hooks.device import require_gpu
from memscope.program.applied_plan import AppliedPlan
from memscope.program.recorder import ProgramRecorder
from memscope.program.request import Offers, Request
from memscope.program.scratch import Scratch
from memscope.program.stop import StepLimits, Stop
from memscope.simulation.assumptions import Assume
from memscope.simulation.devices.catalogue import get_device, load_devices
from memscope.simulation.machine.machine import SimulatedMachine
from memscope.strategies import Plan, available
from memscope.trace import Trace

__all__ = ["ProgramWatch", "begin"]


def begin(request: Request, stop: Stop) -> ProgramWatch:
    """Begin to watch this process; with a simulated device, it has that device from now on.

    Args:
        request: what the launcher asks for.
        stop: called when enough steps are done and the next one would begin; writes the results and raises `Enough`.

    Raises:
        MemscopeError: the request cannot be carried out in this process.
    """
    if request.device == "cuda":
        require_gpu()
    return ProgramWatch(request, stop)


class ProgramWatch:
    """Records this process, and keeps the trace if it is the first process of the program to train.

    Attributes:
        has_claimed: whether this process is the one that is recorded.
        notes: texts that are shown with the results.
    """

    def __init__(self, request: Request, stop: Stop) -> None:
        """Watch the process. On a real GPU, recording begins with the first call of a model, which initializes it."""
        self.has_claimed = False
        self.notes: list[str] = []
        self._request, self._stop = request, stop
        self._scratch = Scratch(Path(request.folder))
        self._machine = _machine(request)
        self._plan = Plan.parse(request.strategies)
        machine = self._machine
        self._recorder = ProgramRecorder(
            limits=StepLimits(request.steps, request.deadline),
            before_step=self._step_begins,
            before_optimizer=self._optimizer_begins,
            stop=stop,
            device=torch.device("cuda", 0) if request.device == "cuda" else None,
            meta=_meta(request, self._plan),
            execute=machine.execute if machine else None,
            kernels=machine.kernels if machine else None,
            fake_mode=machine.mode if machine else None,
        )
        self._scopes = contextlib.ExitStack()
        if machine:
            machine.follow(self._recorder.tracker)
            machine.__enter__()  # to the end of the process: what the program holds cannot live without it
        asks = available() if request.asks else ()
        self._applied = AppliedPlan(self._plan, self._recorder.model_changed, asks, request.layer_list)
        if self._plan or request.asks:
            self._scopes.enter_context(self._applied)
        if request.device == "cuda":
            self._first_call: Any = register_module_forward_pre_hook(self._begin_recording)
        else:
            self._scopes.enter_context(self._recorder)

    @property
    def steps(self) -> int:
        """Number of optimizer steps that were completed."""
        return self._recorder.steps

    @property
    def is_late(self) -> bool:
        """Whether the program was stopped because its deadline had passed."""
        return self._recorder.is_late

    @property
    def offers(self) -> Offers | None:
        """What could be changed in the program; None if the request does not ask."""
        return self._applied.offers

    def finish(self, error: BaseException | None) -> Trace | None:
        """End the recording; called once. The trace; None if this process has not trained.

        Args:
            error: the exception that ended the program.

        Raises:
            MemscopeError: no trace can be made.
        """
        self._scopes.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        if not self.has_claimed:
            return None
        trace = self._recorder.trace()
        if self._plan:
            self.notes += self._applied.notes
            trace = replace(trace, meta={**trace.meta, "chosen": self._applied.chosen})
        return self._machine.finished(trace, self._recorder.work) if self._machine else trace

    def _begin_recording(self, module: nn.Module, inputs: Any) -> None:
        self._first_call.remove()
        self._scopes.enter_context(self._recorder)
        self._recorder.call_has_begun(module)  # PyTorch runs the hooks that there were when the call began

    def _step_begins(self, done: int) -> None:
        """A step begins after `done` others."""
        if (not self.has_claimed or self._scratch.is_fork) and not self._scratch.claim():
            self._recorder.stops = False
            return
        self.has_claimed = True
        self._scratch.tell_step(done + 1)
        if self._plan:
            self._applied.require_use(built=False)

    def _optimizer_begins(self) -> None:
        if self._plan and self.has_claimed:
            self._applied.require_use(built=True)


def _machine(request: Request) -> SimulatedMachine | None:
    if not request.simulated:
        return None
    device = get_device(request.device, load_devices(Path(request.device_file)) if request.device_file else None)
    return SimulatedMachine(device, AllocatorSettings.asked(request.allocator), Assume.parse(request.assume))


def _meta(request: Request, plan: Plan) -> dict[str, Any]:
    """The `meta` entries that describe the run."""
    return {
        "strategies": plan.specs,
        "device": {"name": request.device, "simulated": request.simulated},
        **({"seconds": None} if request.simulated else {}),
    }
