"""The two clocks of a simulated step: the host launches kernels, the device runs them one after the other.

The host runs ahead of the device until it waits, for example for the value of a loss. A kernel begins when it has been
launched and the kernel before it has ended, so an operator takes as long as the device's clock advances: its own kernel
and, where the device has nothing to do, the wait for the host.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from memscope.hooks.storages import StorageTracker
from memscope.hooks.work import NOTHING, Execute, Work
from memscope.trace import PHASES

__all__ = ["BACKWARD_LAUNCH_SECONDS", "LAUNCH_SECONDS", "Timeline"]

LAUNCH_SECONDS = 24e-6
"""Host time of an operator that Python calls and that runs a kernel, with the views and modules around it.

Derived from PyTorch's *GPT, Fast* (pytorch.org/blog/accelerating-generative-ai-2, November 2023): before compilation,
LLaMA2-7B makes 25.5 tokens/s on an A100 and is bound by the host. The model of that repository (pytorch-labs/gpt-fast,
model.py of 03e10bc) runs 51 kernels in each of 32 layers and about 25 outside them for a token: 1 s / 25.5 / 1657.
"""

BACKWARD_LAUNCH_SECONDS = 12e-6
"""Host time of an operator that autograd's engine calls, without Python, with the views around it.

The sum of 6.5 µs for engine and dispatch (CPU time of the backward pass of LLaMA's layers with four tokens and 32
channels, by number of kernels: PyTorch 2.13, one thread of a server's processor) and 4 to 6 µs for the launch
(susun-blog.com/blog/pegainfer-3-cuda-graph). Published figures are a bound on each side: 7 µs
(`kernel_launch_overhead` of meta-pytorch/autoparallel, pull request 146, an H100), and 26 µs, from a backward pass of
four kernels that took 136 µs on an A100 (pytorch issue 157407), less 31 µs for its start (issue 44484).
"""

_BACKWARD = PHASES.index("backward")
_READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Timeline:
    """Runs operators; the time of each is the advance of the device's clock. See `Execute`.

    Attributes:
        tracker: knows the phase, and which tensors are on the host; None before it is known.
    """

    def __init__(self, execute: Execute, *, waits_after_step: bool) -> None:
        """Begin with both clocks at 0.

        Args:
            execute: runs an operator; `Work.seconds` of its work is the time of its kernels.
            waits_after_step: whether the host waits for the device after each step, as a loop that reads its loss does.
        """
        self.tracker: StorageTracker | None = None
        self._execute, self._waits_after_step = execute, waits_after_step
        self._host = self._device = 0.0
        self._step = -1

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """Run an operator, and return its result and its work."""
        out, work = self._execute(func, args, kwargs)
        assert self.tracker is not None, "operators run while a tracker follows them"
        here = self.tracker.position
        if here.step != self._step:
            self._step = here.step
            if self._waits_after_step:
                self._wait()
        if work is NOTHING or not work.seconds:
            if _reads_values(func) and not self._is_on_host(args):
                self._wait()
            return out, work
        before = self._device
        self._host += BACKWARD_LAUNCH_SECONDS if here.phase == _BACKWARD else LAUNCH_SECONDS
        self._device = max(self._host, self._device) + work.seconds
        if self.tracker.hides or _reads_values(func):  # the result goes to the host
            self._wait()
        return out, work._replace(seconds=self._device - before)

    def _wait(self) -> None:
        self._host = max(self._host, self._device)

    def _is_on_host(self, args: tuple[Any, ...]) -> bool:
        assert self.tracker is not None, "operators run while a tracker follows them"
        return any(isinstance(arg, Tensor) and self.tracker.lifetimes.is_hidden(arg) for arg in args)


@cache
def _reads_values(func: Any) -> bool:
    """Whether the host needs values to go on: for a number, or for the size of a result."""
    return not _READS_VALUES.isdisjoint(getattr(func, "tags", ()))
