"""Threads of a simulated program: they may work on the host, but not with its GPU.

PyTorch's modes belong to one thread, so operators of another one would go unseen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from memscope.simulation.facade.stand_in import replaced
from memscope.simulation.machine.moves import gpu_named
from memscope.simulation.refusal import NotSimulated

__all__ = ["threads_stay_on_the_host"]


@contextlib.contextmanager
def threads_stay_on_the_host() -> Iterator[None]:
    """Refuse work with weights and with the GPU in threads that start inside."""
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        run = thread.run

        def within() -> None:
            with _OnHost():
                run()

        thread.run = within  # type: ignore[method-assign]
        begin(thread)

    with replaced(threading.Thread, "start", start):
        yield


class _OnHost(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or any(map(_concerns_gpu, (*args, *kwargs.values()))):
            raise NotSimulated(
                f'thread "{threading.current_thread().name}" works with weights or with the GPU, but a simulation '
                "follows the main thread only: train there, or record a real run"
            )
        return func(*args, **kwargs)


def _concerns_gpu(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return _any(value)
    is_device = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
    return isinstance(value, FakeTensor) or (is_device and bool(gpu_named(value)))


def _any(values: Iterable[Any]) -> bool:
    return any(map(_concerns_gpu, values))
