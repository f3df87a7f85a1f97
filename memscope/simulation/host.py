"""The host beside a simulated GPU. Between stand-ins, PyTorch would copy nothing, since all of them are on the CPU.

A copy on the host takes no device memory. `x.cpu()` always makes one, because PyTorch's own code calls it in
`save_on_cpu`. `x.to("cpu")` makes one only in a target's code: elsewhere, `"cpu"` also names the stand-ins' device.
What is computed from copies alone is on the host, too, as is what a factory makes in pinned memory.

A copy takes the time of the link between device and host, and the device waits for it. Work on the host takes none:
how fast its processor is, is not known, which the estimate says.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import graph
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.hooks.kernels import Kernels, Workspace
from memscope.hooks.storages import StorageTracker
from memscope.hooks.work import NOTHING, Execute, Work
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.devices.cost import transfer_seconds
from memscope.simulation.facade.stand_in import is_target, replaced

__all__ = ["HostKernels", "HostOperators", "Link", "PinnedBefore", "host_copies"]

_COPY = torch.ops.aten.copy_.default


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


class HostOperators:
    """Runs operators over a link; those whose tensors come from the device, but are on the host, run there.

    Attributes:
        tracker: knows which tensors are on the host, and is told which results are; None before it is known.
        link: the link between device and host.
        works: whether the host has computed something.
    """

    def __init__(self, link: Link) -> None:
        self.link, self.works = link, False
        self.tracker: StorageTracker | None = None
        self._place: bool | None = None
        self._pins = self._computes = self._follows = False

    @property
    def is_moving(self) -> bool:
        """Whether the results of operators have a place."""
        return self._place is not None

    @contextlib.contextmanager
    def moving(self, *, to_host: bool, crossing: bool, pinned: bool = False, followed: bool = False) -> Iterator[None]:
        """Operators inside make their results on the host or on the device.

        Args:
            to_host: whether on the host.
            crossing: whether they cross the link.
            pinned: whether the memory is pinned.
            followed: whether the results belong to the step, though nothing that they are made from does.
        """
        before = self._place, self._pins, self._computes, self._follows
        self._place, self._pins, self._computes, self._follows = to_host, pinned, to_host and not crossing, followed
        try:
            with self.link.crossed(crossing):
                yield
        finally:
            self._place, self._pins, self._computes, self._follows = before

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """See `Execute`."""
        tracker = self.tracker
        if tracker is None:
            return self.link(func, args, kwargs)
        pinned = bool(kwargs.get("pin_memory"))
        if pinned:
            kwargs = {**kwargs, "pin_memory": False}  # fake tensors refuse it
        tracker.hides, tracker.pins, tracker.follows = self._place or pinned, self._pins or pinned, self._follows
        if self._place is not None:
            return self._at_home(func, args, kwargs) if self._computes else self.link(func, args, kwargs)
        places = self._places((*args, *kwargs.values()))
        if func is _COPY and True in places and False in places:
            tracker.lifetimes.copied(args[0], args[1])
            with self.link.crossed(True):
                return self.link(func, args, kwargs)
        if pinned or (places and all(places)):
            tracker.hides = True
            return self._at_home(func, args, kwargs)
        return self.link(func, args, kwargs)

    def are_there(self, values: tuple[Any, ...]) -> bool:
        """Whether all tensors among some arguments are on the host."""
        places = self._places(values) if self.tracker is not None else []
        return bool(places) and all(places)

    def _at_home(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """Run an operator on the host."""
        out, work = self.link(func, args, kwargs)
        self.works |= work.seconds > 0 and any(isinstance(leaf, Tensor) for leaf in _leaves(args))
        return out, NOTHING

    def _places(self, values: tuple[Any, ...]) -> list[bool]:
        """Whether each tensor among some arguments is on the host; empty while nothing is."""
        assert self.tracker is not None, "asked for operators that a tracker follows"
        lifetimes = self.tracker.lifetimes
        if lifetimes.host is None or not lifetimes.host.tensors:
            return []
        return [lifetimes.comes_from_device(leaf) for leaf in _leaves(values) if isinstance(leaf, Tensor)]


class HostKernels:
    """The workspaces of kernels on the device; an operator on the host takes none."""

    def __init__(self, host: HostOperators, kernels: Kernels) -> None:
        self._host, self._kernels = host, kernels
        self.covers, self.has_own_order, self.born = kernels.covers, kernels.has_own_order, kernels.born

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Workspace]:
        """See `Kernels`."""
        return () if self._host.are_there((*args, *kwargs.values())) else self._kernels(func, args, kwargs)


class PinnedBefore(TorchDispatchMode):
    """Collects what is pinned before a tracker follows the host, as by an optimizer that is built on it.

    Attributes:
        tensors: the pinned tensors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs or not kwargs.get("pin_memory"):
            return func(*args, **(kwargs or {}))
        made = func(*args, **{**kwargs, "pin_memory": False})
        self.tensors.append(made)
        return made


@contextlib.contextmanager
def host_copies(tracker: StorageTracker, host: HostOperators, before: PinnedBefore) -> Iterator[None]:
    """Make `x.cpu()` and a target's `x.to("cpu")` copy to the host, and `x.to(device)` and `x.cuda()` copy back.

    The copies are followed by the tracker, and what was pinned before. The methods themselves are replaced because a
    PyTorch mode does not see calls from autograd's hooks.
    """
    host.tracker = tracker
    tracker.lifetimes.follow_host()
    while before.tensors:
        tracker.lifetimes.hide_result(before.tensors.pop(0), 0, (), pinned=True)
    copy: Any = Tensor.cpu
    move: Any = Tensor.to

    def is_on_host(tensor: Any) -> bool:
        return isinstance(tensor, FakeTensor) and tracker.lifetimes.is_hidden(tensor)

    def to_host(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        leaves = not is_on_host(tensor)
        # Pinned if asynchronous: `_to_copy` in aten/src/ATen/native/TensorConversions.cpp (2.6 to 2.13).
        with host.moving(to_host=True, crossing=leaves, pinned=leaves and _is_asynchronous(args, kwargs)):
            moved = move(tensor, *args, **kwargs)
            return move(tensor, tensor.device, copy=True) if moved is tensor and leaves else moved

    def to_device(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        arrives = is_on_host(tensor)
        with host.moving(to_host=False, crossing=arrives):
            moved = move(tensor, *args, **kwargs)
            return move(tensor, tensor.device, copy=True) if moved is tensor and arrives else moved

    def cpu(tensor: Tensor, **kwargs: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return copy(tensor, **kwargs)
        return tensor if is_on_host(tensor) else to_host(tensor, tensor.device, **kwargs)

    def cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return to_device(tensor, tensor.device) if isinstance(tensor, FakeTensor) else tensor

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, torch.device, Tensor))]
        is_moving = host.is_moving  # PyTorch finds the methods by their names, and calls this one below another
        if is_moving or not isinstance(tensor, FakeTensor) or not (places or is_on_host(tensor)):
            return move(tensor, *args, **kwargs)
        is_to_host = _names_host(places) and is_target(sys._getframe(1)) if places else True
        return (to_host if is_to_host or any(map(is_on_host, places)) else to_device)(tensor, *args, **kwargs)

    def save_on_cpu(hooks: Any, pin_memory: bool = False, device_type: str = "cuda") -> None:
        def pack(tensor: Tensor) -> Tensor:  # PyTorch's own asks whether there is a GPU, and is told the truth
            return to_host(tensor, tensor.device, non_blocking=pin_memory)  # type: ignore[no-any-return]

        graph.saved_tensors_hooks.__init__(hooks, pack, lambda packed: to_device(packed, packed.device))

    stepping = contextlib.ExitStack()

    def begin_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if updated and all(
            map(tracker.lifetimes.comes_from_device, updated)
        ):  # what it makes from nothing is there, too
            stepping.enter_context(host.moving(to_host=True, crossing=False))

    with stepping, contextlib.ExitStack() as scopes:
        scopes.callback(register_optimizer_step_pre_hook(begin_step).remove)
        scopes.callback(register_optimizer_step_post_hook(lambda *_: stepping.close()).remove)
        scopes.enter_context(replaced(graph.save_on_cpu, "__init__", save_on_cpu))
        for name, method in (("cpu", cpu), ("cuda", cuda), ("to", to)):
            scopes.enter_context(replaced(Tensor, name, method))
        yield


def _leaves(values: tuple[Any, ...]) -> Iterator[Any]:
    """Arguments of an operator, and the items of those that are lists."""
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _names_host(places: list[Any]) -> bool:
    return any(torch.device(place).type == "cpu" for place in places if not isinstance(place, Tensor))


def _is_asynchronous(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The argument `non_blocking` of `Tensor.to`, the first that is a boolean."""
    return bool(kwargs.get("non_blocking", next((value for value in args if type(value) is bool), False)))
