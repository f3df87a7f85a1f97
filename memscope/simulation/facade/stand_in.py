"""The device that stand-ins for GPU tensors report: `cuda:0` to a target's code, the CPU to PyTorch and memscope.

The stand-ins are fake CPU tensors, and PyTorch's own code must see them on the CPU. The answer therefore depends on
the caller: code of PyTorch and memscope gets the real device, and all other code counts as the target's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from memscope.hooks.parts import PLAIN, is_wrapper, parts_of

__all__ = ["AnyGenerator", "is_target", "replaced", "tensors_say_cuda", "wrapper_maker"]

_CPU, _CUDA = torch.device("cpu"), torch.device("cuda", 0)


@contextlib.contextmanager
def tensors_say_cuda(on_record_stream: Callable[[], None]) -> Iterator[None]:
    """Make fake CPU tensors report `cuda:0` to targets, and tensors that a target creates on a GPU fake CPU tensors.

    `Tensor.record_stream` does nothing but call `on_record_stream`.
    """
    devices = _Devices()
    autograd: Any = torch.autograd  # it calls this function by a name of its own, which it does not export
    with contextlib.ExitStack() as scopes:
        for owner, name, value in (
            (torch, "set_default_device", _set_default_device(torch.set_default_device)),
            (torch, "Generator", AnyGenerator),
            (nn.Module, "to", _module_to(nn.Module.to)),
            (FakeTensor, "device", _device_property(FakeTensor.device)),
            (
                Tensor,
                "record_stream",
                lambda tensor, stream: on_record_stream(),
            ),  # PyTorch parses its arguments before asking a mode
            (Tensor, "_make_wrapper_subclass", wrapper_maker(Tensor._make_wrapper_subclass)),
            (autograd, "_engine_run_backward", _within(devices, autograd._engine_run_backward)),
        ):
            scopes.enter_context(replaced(owner, name, value))
        scopes.enter_context(devices)
        yield


def _within(mode: TorchFunctionMode, run: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a mode around `run`: `loss.backward()` takes modes off the stack, so the code it runs would see none."""

    def run_within(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    return run_within


def is_target(frame: FrameType) -> bool:
    """Whether a frame runs a target's code: outside PyTorch and memscope, or in a part of memscope that stands for it.

    These are memscope's own targets, and the strategies that move tensors between GPU and host.
    """
    name: str = frame.f_globals.get("__name__", "")
    package = name.partition(".")[0]
    return package != "torch" and (package != "memscope" or name.startswith(_TARGETS))


_TARGETS = ("memscope.targets.", "memscope.strategies.offload.")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute for the duration of the context."""
    inherited = name not in vars(owner)
    before = None if inherited else vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, before)


class _Devices(TorchFunctionMode):
    """Redirects arguments that name a GPU to the stand-ins' device, and makes stand-ins report a GPU to targets."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ANSWERS and is_target(_caller()):
            return _ANSWERS[func](args[0])
        if func in _ALREADY_DONE:
            return args[0]
        if not kwargs and len(args) == 1 and type(args[0]) is FakeTensor:  # most calls query a size or a stride
            return func(*args)
        kwargs = kwargs or {}
        if func is torch.device:
            return torch.device("cuda", *args) if args and type(args[0]) is int else func(*args, **kwargs)
        if func is torch.zeros and args == ((),) and kwargs.keys() <= {"dtype"}:
            # A counter on the host, as Adadelta, RMSprop and Rprop make it; torch.tensor(x) is recognized as such.
            return torch.tensor(0.0, dtype=kwargs.get("dtype") or torch.get_default_dtype())
        if func is Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], _CPU, *args[2:])
        if any(map(_names_gpu, args)) or any(map(_is_gpu_argument, kwargs, kwargs.values())):
            args = [_CPU if _names_gpu(value) else value for value in args]
            kwargs = {name: _CPU if _is_gpu_argument(name, value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


_ALREADY_DONE = {Tensor.cuda, Tensor.pin_memory}
_ANSWERS: dict[Any, Callable[[Any], Any]] = {
    Tensor.get_device: lambda tensor: 0,
    Tensor.is_cuda.__get__: lambda tensor: _is_stand_in(tensor),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda tensor: not _is_stand_in(tensor),  # type: ignore[attr-defined]
    Tensor.device.__get__: lambda tensor: _CUDA if _is_stand_in(tensor) else tensor.device,
}
"""Tensor method or attribute → its result for a target."""


def _caller() -> FrameType:
    """Frame that called a function which reached this mode, past the `__torch_function__` frames of other modes."""
    frame = sys._getframe(1)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _names_gpu(value: Any) -> bool:
    kind = type(value)
    return (kind is torch.device and value.type == "cuda") or (kind is str and value.partition(":")[0] == "cuda")


def _is_gpu_argument(name: str, value: Any) -> bool:
    return _names_gpu(value) or (name == "device" and type(value) is int)


def _is_stand_in(tensor: Any) -> bool:
    """Whether a tensor is a stand-in, or wraps one."""
    if isinstance(tensor, FakeTensor) or type(tensor) in PLAIN:
        return isinstance(tensor, FakeTensor)
    return is_wrapper(tensor) and any(isinstance(part, FakeTensor) for part in parts_of(tensor))


def wrapper_maker(original: Callable[..., Tensor]) -> staticmethod[..., Tensor]:
    """Give a wrapper the device of the stand-ins that it holds: its class is a target's code, which sees a GPU."""

    def make(*args: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs and _is_gpu_argument("device", kwargs["device"]):
            kwargs["device"] = _CPU
        return original(*args, **kwargs)

    return staticmethod(make)


def _device_property(original: Any) -> property:
    def device(tensor: FakeTensor) -> torch.device:
        found: torch.device = original.fget(tensor)
        return _CUDA if found == _CPU and is_target(sys._getframe(1)) else found

    return property(device, original.fset)


def _module_to(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Accept a GPU in `module.to(0)`: PyTorch parses these arguments without asking a mode."""

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if args and type(args[0]) is int:
            args = (_CPU, *args[1:])
        return original(
            module, *args, **{name: _CPU if _is_gpu_argument(name, value) else value for name, value in kwargs.items()}
        )

    return to


def _set_default_device(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def set_default_device(device: Any) -> None:
        if not _is_gpu_argument("device", device):
            original(device)

    return set_default_device


class _AnyGenerator(type(torch.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class AnyGenerator(torch.Generator, metaclass=_AnyGenerator):
    """A generator on the stand-ins' device, whichever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> AnyGenerator:
        """A generator on the CPU."""
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]
