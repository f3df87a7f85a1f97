"""Where a run is: its phase, step and micro-batch, and the module at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from memscope.hooks.allocations import Allocations
from memscope.hooks.modules import ModuleStack
from memscope.hooks.moments import Moments
from memscope.trace import PHASES, Phase

__all__ = ["Position"]

_current_task: Callable[[], int] = torch._C._current_graph_task_id
_current_node: Callable[[], Any] = torch._C._current_autograd_node
_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
_autograd: Any = torch.autograd  # it calls the engine by a name of its own, which it does not export
_FORWARD, _LOSS, _BACKWARD, _RECOMPUTE, _OUTSIDE = (
    PHASES.index(p) for p in ("forward", "loss", "backward", "recompute", "outside")
)
_KEPT = (_FORWARD, _LOSS)


class _Pass(NamedTuple):
    """The backward pass that runs, as `_engine_run_backward` in torch/autograd/graph.py is called for it."""

    creates_graph: bool
    accumulates: bool
    """Whether it adds to the gradients of parameters, as `backward` does; `torch.autograd.grad` returns its own."""


class Position:
    """Follows the position of a run: told by `move_to`, and found for each operator by `locate`.

    While it is entered, it also notes which backward passes record a graph of their own (`create_graph=True`).

    Attributes:
        step, micro_batch: set by the recorder.
        module, phase: indices of the module at work and of the phase, at the last operator.
        told: whether `run_step` reports phases and inputs, so that they need not be recognized.
        saw_backward: whether a backward pass has run since the last forward phase began; gradients that are part of a
            loss (`torch.autograd.grad(..., create_graph=True)`) are none.
        optimizes: whether an optimizer steps in a backward pass: its work is no part of that pass.
        is_recorded: whether autograd records the running operator; known for the phase `outside` alone.
        serves_backward: whether autograd may keep what the running operator makes.
    """

    def __init__(
        self,
        modules: ModuleStack,
        seen: Allocations,
        moments: Moments | None,
        *,
        on_backward: Callable[[], None],
        after_backward: Callable[[], None],
    ) -> None:
        """Begin in the setup.

        Args:
            modules: the stack of running modules.
            seen: receives the changes of phase.
            moments: receives them too, in a run on a GPU.
            on_backward: called when a backward pass begins, before any of its operators is seen.
            after_backward: called when the end of a backward pass is noticed: at the next operator or phase.
        """
        self.step, self.micro_batch = -1, 0
        self.module = self.phase = 0
        self.told = self.saw_backward = self.optimizes = self.is_recorded = self.serves_backward = False
        self._modules, self._seen, self._moments = modules, seen, moments
        self._on_backward, self._after_backward = on_backward, after_backward
        self._base_phase = PHASES.index("setup")
        self._in_backward = False
        self._task = -1
        self._pass = _Pass(creates_graph=False, accumulates=True)
        self._last_node = 0
        self._run_backward = _autograd._engine_run_backward
        self._mark(self._base_phase)

    def __enter__(self) -> Position:
        self._run_backward = run = _autograd._engine_run_backward

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            outer, self._pass = self._pass, _Pass(args[3], kwargs.get("accumulate_grad", False))
            try:
                return run(*args, **kwargs)
            finally:
                self._pass = outer

        _autograd._engine_run_backward = run_backward
        return self

    def __exit__(self, *exception: object) -> None:
        _autograd._engine_run_backward = self._run_backward

    def move_to(self, phase: Phase, step: int, micro_batch: int) -> None:
        """Begin a phase. It lasts until the next call, except for work of the autograd engine."""
        if self._in_backward and _current_task() < 0:
            self._leave_backward()
        self.step, self.micro_batch, self._base_phase = step, micro_batch, PHASES.index(phase)
        if phase == "forward":
            self.saw_backward = False
        self._last_node = _sequence_number()
        self._mark(self._base_phase)

    def _mark(self, phase: int) -> None:
        self._seen.mark(phase, self.step, self.micro_batch)
        self.phase = phase
        if self._moments is not None:
            self._moments.mark(self.module, phase, self.step, self.micro_batch)

    @property
    def is_in_backward(self) -> bool:
        """Whether the autograd engine runs in this thread."""
        return _current_task() >= 0

    @property
    def base_phase(self) -> Phase:
        """The phase that the last `move_to` began."""
        return PHASES[self._base_phase]

    def locate(self) -> None:
        """Find the running module and phase, and detect the end of a forward pass or recomputation."""
        modules = self._modules
        task = _current_task()
        if task < 0 or self.optimizes:
            if self._in_backward and task < 0:
                self._leave_backward()
            phase = self._base_phase
            self.module = modules.current if modules.stack else modules.called_last
            if phase == _OUTSIDE:
                self._notice_record()
                self.serves_backward = self.is_recorded
            else:
                self.serves_backward = phase in _KEPT
        elif torch.is_grad_enabled() and (modules.stack or not self._pass.creates_graph):
            # The engine runs with gradients disabled unless it records a graph: this is a recomputed region.
            phase, self.serves_backward = _RECOMPUTE, True
            self.module = modules.current if modules.stack else modules.of_node(_current_node())
        else:
            if not self._in_backward:
                self._in_backward = True
                self._on_backward()
            creates_graph, accumulates = self._pass
            phase, self.serves_backward = _BACKWARD, creates_graph
            self.saw_backward |= accumulates or not creates_graph
            self.module = modules.of_node(_current_node())
            if self._seen.pending and (task != self._task or not creates_graph):
                self._seen.keep_pending()
            self._task = task
        if phase != self.phase:
            self._mark(phase)

    def _leave_backward(self) -> None:
        self._in_backward = False
        self._after_backward()

    def _notice_record(self) -> None:
        """Note whether autograd records the running operator: it then has just numbered a node.

        Source: torch/csrc/autograd/function.h.
        """
        last, self._last_node = self._last_node, _sequence_number()
        self.is_recorded = self._last_node > last
