"""Weights without memory: a parameter of a simulated program is a fake tensor from its birth on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memscope.simulation.facade.stand_in import replaced
from memscope.simulation.machine.places import Places

__all__ = ["weights_are_fake"]


@contextlib.contextmanager
def weights_are_fake(places: Places) -> Iterator[None]:
    """Make every parameter that is created inside a fake tensor."""
    make: Callable[..., Any] = nn.Parameter.__new__

    def new(cls: type, data: Any = None, requires_grad: bool = True, **kwargs: Any) -> Any:
        if type(data) is Tensor and data.device.type == "cpu" and data.layout is torch.strided:
            fake = places.stand_in_for(data)
            places.replace(data, fake)
            data = fake
        return make(cls, data, requires_grad, **kwargs)

    with replaced(nn.Parameter, "__new__", staticmethod(new)):
        yield
