"""ProgramWatch the training of the present process: from the first call of a model that can train to the last step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from memscope.errors import UsageError
from memscope.hooks.device import require_gpu
from memscope.hooks.recorder import Recorder
from memscope.program.request import Request
from memscope.program.scratch import Scratch
from memscope.program.stop import Stop
from memscope.trace import Trace

__all__ = ["ProgramWatch", "begin"]


def begin(request: Request, stop: Stop) -> ProgramWatch:
    """Begin to watch this process. Nothing changes for the program before its first training step.

    Args:
        request: what the launcher asks for.
        stop: called when enough steps are done and the next one would begin; writes the results and raises `Enough`.

    Raises:
        MemscopeError: the request cannot be carried out in this process.
    """
    if request.simulated:
        raise UsageError(
            f"programs cannot be simulated yet: --device {request.device} is not supported; choose --device cpu or cuda"
        )
    if request.strategies:
        raise UsageError(f'strategies cannot be applied to programs yet: leave out "{request.strategies}"')
    if request.device == "cuda":
        require_gpu()
    return ProgramWatch(request, stop)


class ProgramWatch:
    """Records the training of this process, if it is the first process of the program to train.

    Attributes:
        has_claimed: whether this process is the one that is recorded.
        steps: number of optimizer steps that were completed.
        notes: texts that are shown with the results.
    """

    def __init__(self, request: Request, stop: Stop) -> None:
        """ProgramWatch the calls of modules."""
        self.has_claimed, self.steps = False, 0
        self.notes: list[str] = []
        self._request, self._stop = request, stop
        self._scratch = Scratch(Path(request.folder))
        self._recorder: Recorder | None = None
        self._optimizer: Any = None
        self._call: Callable[..., Any] = nn.Module.__call__
        call, begins = self._call, self._begins

        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            begins(module)
            return call(module, *args, **kwargs)

        nn.Module.__call__ = watched  # type: ignore[method-assign]

    def finish(self, error: BaseException | None) -> Trace | None:
        """End the recording; called once. The trace; None if this process has recorded nothing.

        Args:
            error: the exception that ended the program.

        Raises:
            MemscopeError: no trace can be made.
        """
        nn.Module.__call__ = self._call  # type: ignore[method-assign]
        if self._recorder is None:
            return None
        self._recorder.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        return self._recorder.trace()

    def _begins(self, module: nn.Module) -> None:
        """A module is called."""
        if not torch.is_grad_enabled():
            return
        if self._recorder is not None and not self._scratch.is_fork:
            if self._request.steps is not None and self.steps >= self._request.steps:
                self._stop()
            return
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return
        if not self._scratch.claim():
            nn.Module.__call__ = self._call  # type: ignore[method-assign]
            return
        self.has_claimed = True
        self._scratch.tell_step(1)
        device = {"name": self._request.device, "simulated": False}
        self._recorder = Recorder(module, meta={"device": device, "strategies": []})
        self._recorder.__enter__()
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._optimizer is None:
            self._optimizer = optimizer
        if optimizer is self._optimizer and not self._scratch.is_fork:
            self.steps += 1
            self._scratch.tell_step(self.steps + 1)
