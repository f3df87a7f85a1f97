"""Where tensors say that they are: to the program, to PyTorch's own code, and to autograd's engine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from memscope.simulation.facade.stand_in import AnyGenerator, is_target, replaced, wrapper_maker
from memscope.simulation.machine.moves import GPU, STAND_IN, ProgramCalls
from memscope.simulation.machine.places import Places

__all__ = ["tensors_of_a_program"]


@contextlib.contextmanager
def tensors_of_a_program(places: Places, calls: ProgramCalls, on_record_stream: Callable[[], None]) -> Iterator[None]:
    """Make fake tensors report their place, and let `calls` see the functions that a program calls.

    `Tensor.record_stream` does nothing but call `on_record_stream`.
    """
    autograd: Any = torch.autograd  # it calls this function by a name of its own, which it does not export
    with contextlib.ExitStack() as scopes:
        for owner, name, value in (
            (torch, "Generator", AnyGenerator),
            (torch, "set_default_device", calls.set_default_device(torch.set_default_device)),
            (torch, "get_default_device", calls.get_default_device(torch.get_default_device)),
            (nn.Module, "to", _module_to(nn.Module.to)),
            (FakeTensor, "device", _device_property(FakeTensor.device, places)),
            (Tensor, "record_stream", lambda tensor, stream: on_record_stream()),
            (Tensor, "_make_wrapper_subclass", wrapper_maker(Tensor._make_wrapper_subclass)),
            (autograd, "_engine_run_backward", _within(places, calls, autograd._engine_run_backward)),
        ):
            scopes.enter_context(replaced(owner, name, value))
        if places.has_gpu:  # asked by GradScaler
            scopes.enter_context(replaced(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        scopes.enter_context(calls)
        yield


def _within(places: Places, calls: ProgramCalls, run: Callable[..., Any]) -> Callable[..., Any]:
    """Place what the engine makes; `loss.backward()` takes modes off the stack, so code that it runs would see none."""

    def run_within(roots: Any, *args: Any, **kwargs: Any) -> Any:
        with calls, places.calling(None, places.any_on_gpu(roots)):
            return run(roots, *args, **kwargs)

    return run_within


def _module_to(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Accept `module.to(0)`: PyTorch parses these arguments without asking a mode."""

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if args and type(args[0]) is int:
            args = (GPU, *args[1:])
        return original(module, *args, **{k: GPU if k == "device" and type(v) is int else v for k, v in kwargs.items()})

    return to


def _device_property(original: Any, places: Places) -> property:
    def device(tensor: FakeTensor) -> torch.device:
        found: torch.device = original.fget(tensor)
        if found.type != "cpu":
            return found
        caller = sys._getframe(1)
        if is_target(caller):
            return GPU if places.is_on_gpu(tensor) else found
        return STAND_IN if _names_devices(caller.f_globals.get("__name__", "")) and places.is_on_gpu(tensor) else found

    return property(device, original.fset)


def _names_devices(module: str) -> bool:
    """Whether a module of PyTorch works for its users; those with an underscore implement operators."""
    return module.startswith("torch.") and not module.startswith("torch._")
