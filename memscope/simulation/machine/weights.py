"""Weights without memory: a parameter of a simulated program is a fake tensor from its birth on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from memscope.simulation.facade.stand_in import replaced
from memscope.simulation.machine.places import Places

__all__ = ["stand_in_for", "weights_are_fake"]


@contextlib.contextmanager
def weights_are_fake(places: Places, replace: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Make every parameter that is created inside a fake tensor.

    `replace(real, fake)` is called when a real tensor of the host becomes a fake one, which is a parameter.
    """
    make: Callable[..., Any] = nn.Parameter.__new__

    def new(cls: type, data: Any = None, requires_grad: bool = True, **kwargs: Any) -> Any:
        if type(data) is Tensor and data.device.type == "cpu" and data.layout is torch.strided:
            fake = stand_in_for(places, data)
            replace(data, fake)
            data = fake
        return make(cls, data, requires_grad, **kwargs)

    with replaced(nn.Parameter, "__new__", staticmethod(new)):
        yield


def stand_in_for(places: Places, real: Tensor) -> FakeTensor:
    """A fake tensor with the layout of a real one."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        bare = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device="meta")
    return FakeTensor(places.mode, bare, torch.device("cpu"))
