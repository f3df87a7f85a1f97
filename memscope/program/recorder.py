"""Record a program from its first import of PyTorch on: its models are found when they are called."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from memscope.errors import MemscopeError, UsageError
from memscope.hooks.kernels import Kernels
from memscope.hooks.modules import class_of, original_name
from memscope.hooks.recorder import Recorder
from memscope.hooks.work import Execute
from memscope.program.built import optimizers_followed
from memscope.program.models import model_of
from memscope.program.stop import StepLimits
from memscope.trace import Trace

__all__ = ["ProgramRecorder"]

_MOST_STEPS = 8
"""Steps in all for each step asked for, while an optimizer has not stepped as often: in a GAN, or where optimizers are
built again and again."""


class ProgramRecorder(Recorder):
    """Records all models of a program, and ends the program after some optimizer steps.

    Attributes:
        stops: whether it ends the program.
        steps: optimizer steps done by the optimizer that has done most.
        is_late: whether it has ended the program because the deadline had passed.
    """

    def __init__(
        self,
        *,
        limits: StepLimits,
        before_step: Callable[[int], None],
        before_optimizer: Callable[[], None] = lambda: None,
        stop: Callable[[], None],
        device: torch.device | None = None,
        meta: Mapping[str, Any] | None = None,
        execute: Execute | None = None,
        kernels: Kernels | None = None,
        fake_mode: FakeTensorMode | None = None,
    ) -> None:
        """Prepare to record; nothing is watched before the recorder is entered.

        Args:
            limits: how far the program goes.
            before_step: called with the number of steps done when another one begins.
            before_optimizer: called when an optimizer begins its step.
            stop: called when a step would begin after enough of them; it may raise.
            device: the real device to watch; None: the host, or a simulated one.
            meta: see `Recorder`.
            execute: see `Recorder`.
            kernels: see `Recorder`; with them, real tensors are on the host, and not recorded.
            fake_mode: the mode of the tensors that are on a simulated device.
        """
        self._prepare(
            device=device,
            meta=meta,
            on_gpu=kernels is not None,
            execute=execute,
            kernels=kernels,
            fake_mode=fake_mode,
            follows_real=kernels is None,
            name_of=original_name,
        )
        self._limits, self._before_step, self._stop = limits, before_step, stop
        self._before_optimizer = before_optimizer
        self.stops, self.is_late = True, False
        self.steps = 0
        self._steps_of: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._thread = threading.get_ident()

    def __enter__(self) -> Self:
        super().__enter__()
        self._scopes.enter_context(optimizers_followed(self._count_from_none))
        return self

    def _has_run_out(self, error: BaseException | None) -> bool | None:
        """A program may catch the error, tell of it in its own words, and exit: it then ends within a step."""
        return super()._has_run_out(error) or (False if self._step_done or error else None)

    def _count_from_none(self, optimizer: torch.optim.Optimizer) -> None:
        self._steps_of[optimizer] = 0

    def call_has_begun(self, module: nn.Module) -> None:
        """Follow a call that began before the recorder was entered, and ends after."""
        self._modules.enter_call(module)

    def _unknown_call_begins(self, module: nn.Module) -> None:
        if next(module.parameters(), None) is None:  # a loss, say
            return
        model = model_of(module)
        if any(map(is_lazy, model.parameters())):  # this call gives its lazy modules their sizes
            return
        self._modules.add(model)
        self._take_in_model(model)
        self._gradients.refresh()

    def model_changed(self) -> None:
        """Look at the models again: a strategy has given one of them other parameters or modules."""
        self._modules.refresh()
        for model in self._modules.models.values():
            self._take_in_model(model)
        self._gradients.refresh()

    def _call_begins(self, whole: bool) -> None:
        if self._step_done and threading.get_ident() == self._thread:  # evaluation may take longer than all steps
            self._stop_if_late()
        super()._call_begins(whole)

    def _stop_if_late(self) -> None:
        """Stop after the deadline, between two steps, so that all steps of the trace are complete."""
        deadline = self._limits.deadline
        if self.stops and self.steps and deadline is not None and time.monotonic() > deadline:
            self.is_late = True
            self._stop()

    def _begin_step(self) -> None:
        if threading.get_ident() != self._thread:
            raise UsageError(
                f'the program trains in thread "{threading.current_thread().name}", but memscope sees the operators of '
                "the main thread only: train there"
            )
        if self.stops and self._has_done_enough():
            self._stop()
        self._stop_if_late()
        self._before_step(self.steps)
        super()._begin_step()

    def _has_done_enough(self) -> bool:
        wanted = self._limits.steps
        if wanted is None:
            return False
        if self._position.step + 1 >= wanted * _MOST_STEPS:
            return True
        return self.steps >= wanted and all(steps >= wanted for steps in self._steps_of.values())

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer) -> None:
        super()._optimizer_begins(optimizer)
        self._before_optimizer()

    def _optimizer_ends(self, optimizer: torch.optim.Optimizer) -> None:
        self._steps_of[optimizer] = self._steps_of.get(optimizer, 0) + 1
        self.steps = max(self.steps, self._steps_of[optimizer])
        super()._optimizer_ends(optimizer)

    def trace(self) -> Trace:
        """The trace of everything recorded; see `Recorder.trace`.

        With several models, the names of the first one's modules begin with its class's name, too.

        Raises:
            MemscopeError: nothing was recorded.
        """
        if not self._follows_real and not self._tracker.seen.births:
            raise MemscopeError(
                "the program put nothing on the GPU: it trains on the CPU. Move the model and each batch there "
                '(.to("cuda")), or profile with --device cpu'
            )
        trace = super().trace()
        models = list(self._modules.models.values())
        if len(models) < 2:
            return trace
        first = {original_name(name) for name, _ in models[0].named_modules()} - {""}
        kind = class_of(models[0])
        return replace(trace, modules=tuple(f"{kind}.{name}" if name in first else name for name in trace.modules))
