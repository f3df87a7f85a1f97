"""Which tensors are on the simulated GPU, and where an operator runs.

Tensors of the host are real. Tensors on the GPU are fake, and so are weights wherever they are: a weight has no value
that a simulation could use. Fake tensors on the host are *hidden*: they take no memory of the device.

An operator runs on the GPU if one of its arguments is there, else on the host. One without arguments (a factory) makes
its result where the running PyTorch function was told to, or where its arguments are: a function mode sees the call,
and notes the place for the operators below it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from memscope.hooks.kernels import Kernels, Workspace
from memscope.hooks.parts import PLAIN, is_wrapper, parts_of
from memscope.hooks.storages import StorageTracker
from memscope.hooks.work import NOTHING, Execute, Work
from memscope.simulation.assumptions import Assumptions, Origin
from memscope.simulation.guesses import ASSUMED_NUMBER
from memscope.simulation.values import KnownValues, computing, written

__all__ = ["PlacedKernels", "PlacedOperators", "Places"]

_HOST = torch.device("cpu")


class Places:
    """Knows where tensors are.

    Attributes:
        mode: the mode of the fake tensors.
        has_gpu: whether there is a simulated GPU; if not, the host is the device, and nothing is hidden.
        told: whether the running function was told to make its results on the GPU (True) or on the host (False); None:
            it makes them where its arguments are.
        serves_gpu: whether the running function works on tensors of the GPU, so that what it makes without arguments
            belongs there; `floats`: only what it makes of floating-point numbers, as it reads the others.
        tracker: knows which tensors are hidden, and is told which results are; None before it is known.
    """

    def __init__(self, mode: FakeTensorMode, *, has_gpu: bool) -> None:
        self.mode, self.has_gpu = mode, has_gpu
        self.told: bool | None = None
        self.serves_gpu: bool | Literal["floats"] = False
        self.tracker: StorageTracker | None = None

    @contextlib.contextmanager
    def calling(self, told: bool | None, serves_gpu: bool | Literal["floats"] = False) -> Iterator[None]:
        """Run a function; see the attributes."""
        before = self.told, self.serves_gpu
        self.told, self.serves_gpu = told, serves_gpu
        try:
            yield
        finally:
            self.told, self.serves_gpu = before

    def is_on_gpu(self, tensor: Any) -> bool:
        """Whether a tensor, or one that it wraps, is on the simulated GPU."""
        if not self.has_gpu:
            return False
        if isinstance(tensor, FakeTensor):
            if tensor.fake_mode is not self.mode or tensor.fake_device.type == "meta":
                return False
            return self.tracker is None or not self.tracker.lifetimes.is_hidden(tensor)
        if type(tensor) in PLAIN or not isinstance(tensor, Tensor) or not is_wrapper(tensor):
            return False
        return any(self.is_on_gpu(part) for part in parts_of(tensor))

    def any_on_gpu(self, values: Iterable[Any]) -> bool:
        """Whether one of some arguments, or of the lists among them, is on the GPU."""
        return any(
            self.any_on_gpu(value) if isinstance(value, (list, tuple)) else self.is_on_gpu(value) for value in values
        )

    def hide(self, tensor: Tensor) -> None:
        """Place a fake tensor on the host."""
        if self.tracker is not None and self.has_gpu:
            self.tracker.lifetimes.hide(tensor)

    def stand_in_for(self, real: Tensor) -> FakeTensor:
        """A fake tensor with the layout of a real one, whose place is not noted yet."""
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            bare = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device="meta")
        return FakeTensor(self.mode, bare, _HOST)

    def on_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> FakeTensor:
        """A fake tensor on the host."""
        fake = self.stand_in_for(torch.empty(shape, dtype=dtype, device="meta"))
        self.hide(fake)
        return fake

    def replace(self, real: Tensor, fake: Tensor) -> None:
        """A fake tensor of the host takes the place of a real one."""
        self.hide(fake)
        if self.tracker is not None and not self.has_gpu:
            self.tracker.lifetimes.continue_as(real, fake)


class PlacedOperators:
    """Runs each operator where it belongs: on real tensors of the host, or on fake tensors with `execute`."""

    def __init__(
        self,
        places: Places,
        execute: Execute,
        values: KnownValues,
        assumptions: Assumptions,
        *,
        check: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] = lambda func, args, kwargs: None,
    ) -> None:
        """Run with `execute`; `check` is called with each operator of the GPU, and may refuse its arguments."""
        self._places, self._execute, self._check = places, execute, check
        self._values, self._assumptions = values, assumptions

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """See `Execute`."""
        places = self._places
        tracker = places.tracker
        assert tracker is not None, "operators are placed while a tracker follows them"
        found = _fakes(args)
        if kwargs:
            found += _fakes(kwargs.values())
        if places.told is not None and (places.told or found):
            on_gpu = places.told
        elif found:
            on_gpu = any(map(places.is_on_gpu, found))
            if on_gpu:
                self._check(func, args, kwargs)
        elif places.serves_gpu is True or (places.serves_gpu == "floats" and _makes_floats(kwargs)):
            on_gpu = True
        else:
            tracker.hides = False  # real tensors are not followed
            return func(*args, **kwargs), NOTHING
        tracker.hides = places.has_gpu and not on_gpu
        if found and any(type(tensor) is not FakeTensor for tensor in written(func, args, kwargs)):
            return self._write_to_host(func, args, kwargs)
        if on_gpu and not found:
            with places.mode:
                return self._execute(func, args, kwargs)
        out, work = self._execute(func, args, kwargs)
        return out, NOTHING if tracker.hides else work

    def _write_to_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """Write what is known of fake tensors into real ones, or assumed numbers."""
        stand_ins: dict[int, Tensor] = {}
        reals = {id(tensor): tensor for tensor in written(func, args, kwargs) if type(tensor) is not FakeTensor}
        for key, real in reals.items():
            stand_ins[key] = self._places.stand_in_for(real)
            self._places.hide(stand_ins[key])
        replaced = pytree.tree_map_only(Tensor, lambda tensor: stand_ins.get(id(tensor), tensor), (args, kwargs))
        out, work = self._execute(func, *replaced)
        if func._schema.is_mutable:
            self._write(func, args, kwargs, list(reals.values()))
        originals = {id(stand_in): reals[key] for key, stand_in in stand_ins.items()}
        return pytree.tree_map_only(Tensor, lambda tensor: originals.get(id(tensor), tensor), out), work

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reals: list[Tensor]) -> None:
        with computing():
            given = self._values.given(func, args, kwargs)
            if given is not None:
                self._assumptions.rest_on(given.origins)
                func(*given.args, **given.kwargs)
                return
            self._assumptions.rest_on([Origin.here("numbers written to a tensor of the host", str(ASSUMED_NUMBER))])
            for real in reals:
                real.fill_(ASSUMED_NUMBER)


class PlacedKernels:
    """The workspaces of kernels on the GPU; an operator on the host takes none."""

    def __init__(self, places: Places, kernels: Kernels) -> None:
        self._places, self._kernels = places, kernels

    def covers(self, name: str) -> bool:
        """See `Kernels`."""
        return self._kernels.covers(name)

    def has_own_order(self, name: str) -> bool:
        """See `Kernels`."""
        return self._kernels.has_own_order(name)

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Workspace]:
        """See `Kernels`."""
        on_gpu = self._places.any_on_gpu(args) or self._places.any_on_gpu(kwargs.values())
        return self._kernels(func, args, kwargs) if on_gpu else ()

    def born(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        """See `Kernels`."""
        return self._kernels.born(func, args, kwargs) if self._places.any_on_gpu(args) else None


def _makes_floats(kwargs: dict[str, Any]) -> bool:
    """Whether a factory makes a tensor of floating-point numbers."""
    return (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point


def _fakes(values: Iterable[Any]) -> list[FakeTensor]:
    """The fake tensors among some arguments and the lists among them."""
    found: list[FakeTensor] = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            found.append(value)
        elif kind is list or kind is tuple:
            found += _fakes(value)
    return found
