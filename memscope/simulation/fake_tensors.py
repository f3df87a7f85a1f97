"""Replacements, during a simulation, for parts of PyTorch that fail or never finish on fake tensors."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from memscope.simulation.answers import Answers
from memscope.simulation.facade.stand_in import is_target, replaced
from memscope.simulation.refusal import NotSimulated
from memscope.simulation.values import KnownValues

__all__ = ["FakeCopies", "StandIns", "fake_tensors_train", "weight_sizes"]

_NUMBERS = {bool, int, float, complex}


@contextlib.contextmanager
def fake_tensors_train(answers: Answers) -> Iterator[None]:
    """Make gradient scalers, truncated normal initialization and module conversion work on tensors without values.

    Targets cannot tell fake tensors from others.
    """
    with (
        _gradients_are_finite(),
        _truncated_normals_are_within_bounds(),
        _modules_convert_fake_weights(),
        replaced(FakeTensor, "numpy", lambda tensor, *, force=False: answers.array(tensor)),
        replaced(torch, "tensor", _of_fake_numbers(torch.tensor)),
        replaced(torch, "as_tensor", _of_fake_numbers(torch.as_tensor)),
        replaced(torch, "ctc_loss", _with_lengths_in_tensors(torch.ctc_loss)),
        _targets_see_plain_tensors(),
    ):
        yield


def _of_fake_numbers(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Read the numbers in a list of fake tensors first: PyTorch would read their memory, which they do not have."""

    def made(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if _has_fake_numbers(data):
            data = pytree.tree_map_only(FakeTensor, lambda tensor: tensor.tolist(), data)
        return make(data, *args, **kwargs)

    return made


def _with_lengths_in_tensors(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Refuse CTC loss with lengths in lists, which PyTorch would put into memory that fake tensors do not have."""

    def computed(log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, *args: Any) -> Tensor:
        if not (isinstance(input_lengths, Tensor) and isinstance(target_lengths, Tensor)):
            raise NotSimulated("CTC loss can be simulated with lengths in tensors only: pass torch.tensor(lengths)")
        return loss(log_probs, targets, input_lengths, target_lengths, *args)

    return computed


def _has_fake_numbers(data: Any) -> bool:
    if not isinstance(data, (list, tuple)):
        return False
    kinds = set(map(type, data))  # most lists hold many numbers and nothing else
    return FakeTensor in kinds or (not kinds <= _NUMBERS and any(map(_has_fake_numbers, data)))


@contextlib.contextmanager
def _targets_see_plain_tensors() -> Iterator[None]:
    """Let `isinstance(x, torch._subclasses.FakeTensor)` be false in a target's code.

    Libraries take another path for fake tensors, which only a compiler has in their experience: transformers then keeps
    an attention mask whose values it would read otherwise. PyTorch's own code still gets its class, also in modules
    that it imports during the simulation. Source: `is_fake_tensor` in transformers/utils/import_utils.py (5.23).
    """
    package: Any = torch._subclasses

    def found(name: str) -> Any:
        if name != "FakeTensor":
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        return _FakeTensorOfTargets if is_target(sys._getframe(1)) else FakeTensor

    del package.FakeTensor
    package.__getattr__ = found
    _Unseen.is_on = True
    try:
        yield
    finally:
        _Unseen.is_on = False
        del package.__getattr__
        package.FakeTensor = FakeTensor


class _Unseen(type):
    """The class of a class that has no instances during a simulation, and PyTorch's fake tensors at other times."""

    is_on = False

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, FakeTensor) and not _Unseen.is_on


class _FakeTensorOfTargets(metaclass=_Unseen):
    """What a target gets for `FakeTensor`; a module that it imports during a simulation may keep it."""


@contextlib.contextmanager
def _gradients_are_finite() -> Iterator[None]:
    """Let gradient scalers always step: a simulation has no values, and assumes that no gradient overflowed."""
    may_step = torch.amp.GradScaler._maybe_opt_step

    def step(scaler: Any, optimizer: torch.optim.Optimizer, state: Any, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)

    torch.amp.GradScaler._maybe_opt_step = step  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.amp.GradScaler._maybe_opt_step = may_step  # type: ignore[method-assign]


@contextlib.contextmanager
def _truncated_normals_are_within_bounds() -> Iterator[None]:
    """Draw once in `nn.init.trunc_normal_`: that of 2.13 redraws until every value is within bounds.

    Source: `_no_grad_trunc_normal_` in torch/nn/init.py, 2.13; 2.6 and 2.11 clamp instead.
    """
    draw: Callable[..., Tensor] = nn.init._no_grad_trunc_normal_

    def drawn(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return tensor.uniform_() if isinstance(tensor, FakeTensor) else draw(tensor, *args, **kwargs)

    with replaced(nn.init, "_no_grad_trunc_normal_", drawn):
        yield


@contextlib.contextmanager
def _modules_convert_fake_weights() -> Iterator[None]:
    """Let `module.to(...)` change weights in place, so that an optimizer built before keeps them.

    PyTorch does so for other tensors, but would swap fake ones, which fails. Source: `Module._apply` in
    torch/nn/modules/module.py (2.6 to 2.13).
    """
    convert: Callable[..., nn.Module] = nn.Module._apply

    def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = [*module.parameters(recurse), *module.buffers(recurse)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return convert(module, fn, recurse)
        for child in module.children() if recurse else ():
            child._apply(fn)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _converted(parameter, fn)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = convert  # type: ignore[method-assign]


def _converted(weight: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """A weight after `fn`, and its gradient."""
    with torch.no_grad():
        result: Any = fn(weight)
        if weight.grad is not None:
            weight.grad.data = fn(weight.grad)
    if _may_hold(weight, result):
        weight.data = result
        return weight
    return weight if result is weight else nn.Parameter(result, requires_grad=weight.requires_grad)


def _may_hold(weight: Any, result: Any) -> bool:
    """Whether a weight may become a result in place: not one on the meta device, nor a wrapper of other tensors."""
    return type(weight) is FakeTensor and type(result) is FakeTensor and weight.fake_device == result.fake_device


def weight_sizes(mode: FakeTensorMode) -> list[int]:
    """Bytes of each storage that holds a parameter made in a mode and still alive."""
    found = (one for one in gc.get_objects() if type(one) is FakeTensor and one.fake_mode is mode)
    storages = (weight.untyped_storage() for weight in found if isinstance(weight, nn.Parameter))
    return list({storage._cdata: storage.nbytes() for storage in storages}.values())


class StandIns(FakeTensorMode):
    """The mode of fake tensors, in which a GPU is the stand-ins' device.

    A fake kernel that a target registers is a target's code too: `x.device` is a GPU in it. PyTorch runs it where no
    function mode is on.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = kwargs.get("device") if kwargs else None
        if device is not None and device.type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return super().__torch_dispatch__(func, types, args, kwargs)


class FakeCopies(TorchFunctionMode):
    """Implements `copy.deepcopy` of fake tensors: PyTorch's copy does not share its storage with its own views."""

    def __init__(self, values: KnownValues) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            data = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
            self._values.know(data, tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            copied = nn.Parameter(data, requires_grad=False) if is_parameter else data
            memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]
