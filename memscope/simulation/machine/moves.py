"""Calls of PyTorch's functions in a program: each makes its results on the real host or on the simulated GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from memscope.simulation.facade.stand_in import is_target
from memscope.simulation.host import Link
from memscope.simulation.machine.places import Places
from memscope.simulation.refusal import NotSimulated

__all__ = ["GPU", "STAND_IN", "ProgramCalls", "gpu_named"]

GPU = torch.device("cuda", 0)
"""What the program sees as the device of a tensor on the GPU."""
STAND_IN = torch.device("cpu", 0)
"""What PyTorch's own code sees as that device: a name of the CPU that no tensor on the host has, for theirs has no
index."""
_HOST = torch.device("cpu")
_parse_to = torch._C._nn._parse_to
_LARGE_BUFFER = 2**30
"""Bytes from which on a pinned tensor has no memory."""
_METHODS: dict[str, Callable[..., Any]] = {
    name: getattr(Tensor, name) for name in ("to", "cuda", "cpu", "pin_memory", "__deepcopy__")
}
"""PyTorch's methods that copy; a program may replace them."""


class ProgramCalls(TorchFunctionMode):
    """Places the results of functions, and answers where tensors are."""

    def __init__(self, places: Places, link: Link) -> None:
        super().__init__()
        self._places, self._link = places, link
        self._default: torch.device | None = None
        self._answers: dict[Any, Callable[[Any], Any]] = {
            Tensor.get_device: lambda tensor: 0 if places.is_on_gpu(tensor) else -1,
            Tensor.is_cuda.__get__: places.is_on_gpu,  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: lambda tensor: not (places.is_on_gpu(tensor) or tensor.is_meta),  # type: ignore[attr-defined]
        }
        moves = {
            "to": self._to, "cuda": self._cuda, "cpu": self._cpu, "pin_memory": _itself, "__deepcopy__": self._deepcopy,
        }  # fmt: skip
        self._moves = {_METHODS[name]: move for name, move in moves.items()}

    def set_default_device(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        """`torch.set_default_device`, which also takes the GPU."""

        def set_default_device(device: Any) -> None:
            on_gpu = device is not None and gpu_named(device)
            self._default = GPU if on_gpu else None
            original(None if on_gpu else device)

        return set_default_device

    def get_default_device(self, original: Callable[[], torch.device]) -> Callable[[], torch.device]:
        """`torch.get_default_device`."""
        return lambda: self._default or original()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._answers and is_target(_caller()):
            return self._answers[func](args[0])
        if type(func) is FunctionType:  # a method that the program has replaced, as PyTorch finds it by its name
            func = next((method for name, method in _METHODS.items() if getattr(Tensor, name) is func), func)
        move = self._moves.get(func)
        if move is not None:
            return move(func, *args, **(kwargs or {}))
        if not kwargs and len(args) == 1 and type(args[0]) is FakeTensor:  # most calls query a size or a stride
            return func(*args)
        kwargs = kwargs or {}
        if func is _parse_to:  # of module.to(...), which names a device and makes nothing
            return func(*args, **kwargs)
        if func is torch.device:
            return torch.device("cuda", *args) if args and type(args[0]) is int else func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            return self._pinned(func, args, kwargs)
        device = kwargs.get("device")
        if device is None and self._default is not None and func in _device_constructors():
            device = self._default
        if device is not None:
            on_gpu = gpu_named(device)
            if on_gpu is not None:
                kwargs = {**kwargs, "device": _HOST}
                return self._made(on_gpu, func, args, kwargs)
        serves = self._places.any_on_gpu(args) or self._places.any_on_gpu(kwargs.values())
        with self._places.calling(None, serves):
            return func(*args, **kwargs)

    def _made(self, on_gpu: bool, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function returns that was told the device of its result."""
        places = self._places
        # PyTorch's own code names the host for its fake tensors, too.
        told = None if not on_gpu and not is_target(_caller(2)) else on_gpu
        with places.calling(told, told is None and places.any_on_gpu(args)):
            made = func(*args, **kwargs)
        if told and isinstance(made, Tensor) and not places.is_on_gpu(made) and not made.is_meta:
            return self._moved(made, on_gpu=True)  # a tensor that exists, as torch.as_tensor returns it
        return made

    def _pinned(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the host; a large one, into which a program offloads weights or activations, has no memory."""
        kwargs = {**kwargs, "pin_memory": False, "device": "meta"}
        layout = func(*args, **kwargs)
        if not isinstance(layout, Tensor) or layout.nbytes < _LARGE_BUFFER:
            with self._places.calling(False):
                return func(*args, **{**kwargs, "device": _HOST})
        buffer: Any = self._places.stand_in_for(layout)
        self._places.hide(buffer)
        return buffer

    # Copies between host and GPU.

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = self._places
        on_gpu: bool | None = None
        dtype = kwargs.pop("dtype", None)
        rest: list[Any] = []
        if "other" in kwargs:
            args = (kwargs.pop("other"), *args)
        for value in (kwargs.pop("device", None), *args):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                on_gpu, dtype = places.is_on_gpu(value), value.dtype
            elif (type(value) is int and on_gpu is None) or isinstance(value, (str, torch.device)):
                named = gpu_named(value)
                if named is None:  # the meta device, say
                    return func(tensor, value, *rest, **kwargs)
                on_gpu = named if named or is_target(_caller(2)) or _converts_module(_caller(2)) else None
            elif value is not None:
                rest.append(value)
        names = ("non_blocking", "copy")
        kwargs.update(zip(names, rest, strict=False))
        kwargs.pop("non_blocking", None)
        if on_gpu is None or on_gpu == places.is_on_gpu(tensor) or tensor.is_meta:
            if dtype is None and not kwargs:
                return tensor
            with places.calling(None, places.is_on_gpu(tensor)):
                return func(tensor, dtype or tensor.dtype, **kwargs)
        kwargs.pop("copy", None)
        return self._moved(tensor, on_gpu=on_gpu, dtype=dtype, **kwargs)

    def _cuda(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tensor if self._places.is_on_gpu(tensor) else self._moved(tensor, on_gpu=True)

    def _cpu(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._moved(tensor, on_gpu=False) if self._places.is_on_gpu(tensor) else tensor

    def _deepcopy(self, func: Any, tensor: Tensor, memo: dict[int, Any]) -> Any:
        """A copy in the same place. PyTorch's own reads the memory of the storage."""
        if type(tensor) is not FakeTensor:
            return func(tensor, memo)
        if id(tensor) not in memo:
            with self._places.calling(self._places.is_on_gpu(tensor)), torch.no_grad():
                data = tensor.detach().clone(memory_format=torch.preserve_format)
            is_parameter = isinstance(tensor, nn.Parameter)
            copied: Any = nn.Parameter(data, requires_grad=False) if is_parameter else data
            memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    def _moved(self, tensor: Tensor, *, on_gpu: bool, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        if is_lazy(tensor):
            raise NotSimulated(
                "a lazy module was moved to the GPU before its sizes are known: call the model once on the host before "
                "model.cuda(), or give the sizes (nn.Linear for nn.LazyLinear)"
            )
        with self._places.calling(on_gpu), self._link.crossed(True):
            return _METHODS["to"](tensor, dtype or tensor.dtype, copy=True, **kwargs)


def gpu_named(device: Any) -> bool | None:
    """Whether a device named by a program or by PyTorch is the GPU (True) or the host (False); None: another one."""
    if type(device) is int:
        return True
    if isinstance(device, str):
        kind = device.partition(":")[0]
        return True if kind == "cuda" else False if kind == "cpu" else None
    if isinstance(device, torch.device):
        if device.type == "cpu":
            return device.index is not None
        return True if device.type == "cuda" else None
    return None


def _itself(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


def _converts_module(frame: FrameType) -> bool:
    """Whether a frame moves a module, whose argument the program named."""
    return frame.f_code.co_name == "convert" and frame.f_globals.get("__name__") == "torch.nn.modules.module"


def _caller(above: int = 1) -> FrameType:
    """Frame that called a function which reached this mode, past the `__torch_function__` frames of other modes."""
    frame = sys._getframe(above + 1)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame
