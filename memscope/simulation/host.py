"""Copies to the host and back. Between stand-ins, PyTorch would copy nothing, since all of them are on the CPU.

A copy on the host takes no device memory. `x.cpu()` always makes one, because PyTorch's own code calls it in
`save_on_cpu`. `x.to("cpu")` makes one only in a target's code: elsewhere, `"cpu"` also names the stand-ins' device.

A copy takes the time of the link between device and host, and the device waits for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memscope.hooks.storages import StorageTracker
from memscope.hooks.work import Execute, Work
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.devices.cost import transfer_seconds
from memscope.simulation.facade.stand_in import is_target

__all__ = ["Link", "host_copies"]


class Link:
    """Runs operators; a copy between device and host takes as long as the device's link to the host."""

    def __init__(self, execute: Execute, device: Device) -> None:
        self._execute, self._device = execute, device
        self._is_crossed = False

    @contextlib.contextmanager
    def crossed(self, is_crossed: bool) -> Iterator[None]:
        """Operators inside copy to the host or back, if `is_crossed` or if those around them do."""
        before, self._is_crossed = self._is_crossed, self._is_crossed or is_crossed
        try:
            yield
        finally:
            self._is_crossed = before

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """See `Execute`."""
        out, work = self._execute(func, args, kwargs)
        if self._is_crossed and work.seconds and self._device.host_bytes_per_second is not None:
            seconds = transfer_seconds(self._device, out.numel() * out.itemsize)
            work = work._replace(seconds=max(work.seconds, seconds))
        return out, work


@contextlib.contextmanager
def host_copies(tracker: StorageTracker, link: Link) -> Iterator[None]:
    """Make `x.cpu()` and a target's `x.to("cpu")` copy to the host, and `x.to(device)` and `x.cuda()` copy back.

    The methods themselves are replaced because a PyTorch mode does not see calls from autograd's hooks.
    """
    copy: Any = Tensor.cpu
    move: Any = Tensor.to

    def is_on_host(tensor: Any) -> bool:
        return isinstance(tensor, FakeTensor) and tracker.lifetimes.is_hidden(tensor)

    def to_host(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        tracker.hides = True
        try:
            with link.crossed(not is_on_host(tensor)):
                moved = move(tensor, *args, **kwargs)
                return move(tensor, tensor.device, copy=True) if moved is tensor and not is_on_host(tensor) else moved
        finally:
            tracker.hides = False

    def to_device(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        with link.crossed(is_on_host(tensor)):
            moved = move(tensor, *args, **kwargs)
            return move(tensor, tensor.device, copy=True) if moved is tensor and is_on_host(tensor) else moved

    def cpu(tensor: Tensor, **kwargs: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return copy(tensor, **kwargs)
        return tensor if is_on_host(tensor) else to_host(tensor, tensor.device, **kwargs)

    def cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return to_device(tensor, tensor.device) if isinstance(tensor, FakeTensor) else tensor

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, torch.device, Tensor))]
        if not isinstance(tensor, FakeTensor) or not (places or is_on_host(tensor)):
            return move(tensor, *args, **kwargs)
        is_to_host = _names_host(places) and is_target(sys._getframe(1)) if places else True
        return (to_host if is_to_host or any(map(is_on_host, places)) else to_device)(tensor, *args, **kwargs)

    methods = {"cpu": cpu, "cuda": cuda, "to": to}
    for name, method in methods.items():
        setattr(Tensor, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(Tensor, name)


def _names_host(places: list[Any]) -> bool:
    return any(torch.device(place).type == "cpu" for place in places if not isinstance(place, Tensor))
