"""Selective checkpointing: keep the results of chosen calls of a layer, and recompute everything else.

A call is an operator in a module, such as `aten.mm` in `feed_forward.w1`. PyTorch's own selective checkpointing
(`create_selective_checkpoint_contexts` in torch/utils/checkpoint.py) finds a kept result by how often its operator ran
before in the whole region. That number changes when autocast has cached a cast weight. Kept results must not be changed
in place, as `result += update` does in LoRA, and a kept dropout shifts the random numbers of the next one. The two
context managers for `checkpoint` in this file know the module, and have none of these limits.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.errors import UsageError
from memscope.strategies.ckpt.caches import without_caches
from memscope.strategies.ckpt.operators import OperatorTraits, operator
from memscope.strategies.ckpt.options import Call
from memscope.strategies.ckpt.recompute import run_checkpointed

__all__ = ["checkpoint_all_but"]

T = TypeVar("T")
_device_of = torch.ops.prim.device.default


def checkpoint_all_but(name: str, layer: nn.Module, calls: frozenset[Call]) -> None:
    """Wrap the forward of a layer: keep the results of `calls`, recompute the rest. `name` is for messages."""
    place = _Place()
    for inside, module in layer.named_modules():
        module.forward = _Inside(place, inside or ".", module.forward)
    layer.forward = _Selective(name, calls, place, layer)


class _Place:
    """The module of a layer that is running."""

    def __init__(self) -> None:
        self.stack: list[str] = []


class _Inside:
    """A forward function that records its module while it runs."""

    def __init__(self, place: _Place, name: str, forward: Callable[..., Any]) -> None:
        self.place, self.name, self.forward = place, name, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.place.stack.append(self.name)
        try:
            return self.forward(*args, **kwargs)
        finally:  # a recomputation ends by an exception as soon as it has what the backward needs
            self.place.stack.pop()


class _Selective:
    """A layer's forward function, checkpointed but for the results of some calls."""

    def __init__(self, name: str, calls: frozenset[Call], place: _Place, layer: nn.Module) -> None:
        self.name, self.calls, self.place, self.layer, self.forward = name, calls, place, layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = _Kept(self.name, self.calls, self.place)
        arguments = without_caches(args, kwargs, self.layer)
        result = run_checkpointed(self.forward, arguments, lambda: (_Keep(kept), _Reuse(kept)))
        never = sorted(self.calls - kept.made)
        if never and torch.is_grad_enabled():
            raise UsageError(
                f"{self.name}: the option save:{'+'.join(map('/'.join, never))} keeps nothing: no such call was made "
                "in the layer's forward pass. The operators depend on device, precision and sizes: "
                "make the plan for those it is used with"
            )
        return result


@dataclass(eq=False)
class _Memory:
    """A tensor of a kept result."""

    tensor: Tensor
    version: int = 0
    """How often it has been changed in place when the layer's forward ends; PyTorch counts that."""
    was_read: bool = False
    """Something was computed from it, and depends on its value then."""


@dataclass(eq=False)
class _Result:
    """The result of a call that is not repeated."""

    value: Any = None
    """Its result, detached; that of a call in place is its first argument."""
    memory: list[_Memory] = field(default_factory=list)
    random_state: tuple[torch.device, Tensor] | None = None
    """Random state after it, if it drew random numbers."""


@dataclass(eq=False)
class _Kept:
    """The kept results of one forward pass of one layer."""

    name: str
    calls: frozenset[Call]
    place: _Place
    made: set[Call] = field(default_factory=set)
    results: dict[Call, deque[_Result]] = field(default_factory=lambda: defaultdict(deque))
    in_place: dict[Call, deque[_Result | None]] = field(default_factory=lambda: defaultdict(deque))
    """For each call in place: None, or a result if it changed a kept result, which now includes the change."""

    def call(self, op: OperatorTraits) -> Call:
        """The call that is being made."""
        return self.place.stack[-1], op.name

    def chooses(self, call: Call, args: Any) -> bool:
        """Whether to keep the result; never a trained weight's cast, which autocast repeats in the recomputation."""
        return call in self.calls and not (
            call[1] == "aten._to_copy" and isinstance(args[0], nn.Parameter) and args[0].requires_grad
        )


class _Keep(TorchDispatchMode):
    """The forward pass: keeps the results of the chosen calls."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.of_storage: dict[int, _Memory] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Dispatch straight here: the wrapper that hides a mode from torch.compile costs more than the mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device_of and type(args[0]) is FakeTensor:  # a question that autograd asks about every tensor
            return args[0].fake_device
        kwargs, op, kept = kwargs or {}, operator(func), self.kept
        if op.is_question:
            return func(*args, **kwargs)
        call = kept.call(op)
        if op.changes_first:
            changed = self._about_to_change(call, args)
            for memory in self._memory(args[1:], kwargs):
                memory.was_read = True
            out = func(*args, **kwargs)
            state = _random_state(out) if changed and op.draws else None
            kept.in_place[call].append(_Result(random_state=state) if changed else None)
            return out
        given = self._memory(args, kwargs)
        if given and op.changes_others:
            raise self._refused(call, "may be changed in place by")
        out = func(*args, **kwargs)
        for memory in given:
            memory.was_read |= memory not in self._memory(out)  # else the result only shows it, as a view does
        if call in kept.calls:
            kept.made.add(call)
            if kept.chooses(call, args):
                self._keep(call, out, _random_state(out) if op.draws_in(args, kwargs) else None)
        return out

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for memory in self.of_storage.values():
            memory.version = memory.tensor._version
        self.of_storage.clear()

    def _memory(self, *arguments: Any) -> list[_Memory]:
        """The memory of kept results that the arguments are views of."""
        if not self.of_storage:
            return []
        return [self.of_storage[key] for key in map(_storage, _tensors(arguments)) if key in self.of_storage]

    def _about_to_change(self, call: Call, args: Any) -> bool:
        """Whether a call in place changes a kept result, which then includes the change."""
        changed = self._memory(args[0])
        if any(memory.was_read for memory in changed):
            raise self._refused(call, "is used, and then changed in place by")
        return bool(changed)

    def _refused(self, call: Call, why: str) -> UsageError:
        return UsageError(
            f"{self.kept.name}: a result that its option save:… keeps {why} {'/'.join(call)}: its earlier value "
            "is lost. Leave the call that makes it out of the option"
        )

    def _keep(self, call: Call, out: Any, state: tuple[torch.device, Tensor] | None) -> None:
        value = pytree.tree_map_only(Tensor, _detached, out)
        memory = [_Memory(tensor) for tensor in _tensors(value)]
        self.kept.results[call].append(_Result(value, memory, state))
        self.of_storage.update((_storage(part.tensor), part) for part in memory)


class _Reuse(TorchDispatchMode):
    """The recomputation: gives the kept results instead of making the calls again."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.is_used = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in `_Keep`."""
        return False

    def __enter__(self) -> _Reuse:
        if self.is_used:
            raise UsageError(
                f"{self.kept.name}: its option save:… does not support a second backward pass (retain_graph=True): "
                "use the option full"
            )
        self.is_used = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device_of and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs, op, kept = kwargs or {}, operator(func), self.kept
        if op.is_question:
            return func(*args, **kwargs)
        call = kept.call(op)
        if op.changes_first:
            skipped = self._next(kept.in_place, call)
            if skipped is not None:
                self._restore_random_state(skipped)
                return args[0]
        if not kept.chooses(call, args):
            return func(*args, **kwargs)
        result = self._next(kept.results, call)
        if any(part.tensor._version != part.version for part in result.memory):
            raise UsageError(
                f"{kept.name}: the result of {'/'.join(call)}, which its option save:… keeps, was changed in place "
                "after the layer's forward pass: leave it out of the option"
            )
        self._restore_random_state(result)
        return result.value

    def _next(self, queues: dict[Call, deque[T]], call: Call) -> T:
        if not queues[call]:
            raise UsageError(
                f"{self.kept.name}: computed again, its forward calls {'/'.join(call)} more often than before: it "
                "depends on something that has changed, and cannot be recomputed. Use the option none"
            )
        return queues[call].popleft()

    @staticmethod
    def _restore_random_state(result: _Result) -> None:
        if result.random_state is not None:
            device, state = result.random_state
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)


def _random_state(out: Any) -> tuple[torch.device, Tensor]:
    device = _tensors(out)[0].device
    if device.type == "cpu":
        return device, torch.get_rng_state()
    return device, torch.get_device_module(device).get_rng_state(device)


def _tensors(values: Any) -> list[Tensor]:
    # Not `memscope.workload.batch.tensors_in`: this runs in every call, and operators know tensors and lists of them.
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _detached(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, which autograd will not make part of the first pass's graph.

    It shares the count of changes in place, as beneath autograd it would not by itself.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()
