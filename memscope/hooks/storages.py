"""Every storage born and freed, seen from underneath autograd.

A dispatch mode sees each operator after autograd and autocast have done their part: what comes out is what the device
really holds. What is followed is the *storage*: views and in-place results share one, a resize replaces one. Only weak
references are kept, so nothing lives longer for being watched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from memscope.hooks.kernels import Kernels, Workspace
from memscope.hooks.modules import ModuleStack
from memscope.hooks.moments import Moments
from memscope.trace import CATEGORIES, PHASES, Category, Phase

__all__ = ["Allocations", "Birth", "Execute", "StorageTracker"]

_current_task: Callable[[], int] = torch._C._current_graph_task_id
_has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
_current_node: Callable[[], Any] = torch._C._current_autograd_node
Execute = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_device_of = torch.ops.prim.device.default
_PLAIN = {Tensor, nn.Parameter, FakeTensor}
_UNKNOWN = -1
_RESIZE = 1
_PARAMETER, _WEIGHT_COPY, _ACTIVATION, _TEMPORARY, _WORKSPACE, _OTHER = (
    CATEGORIES.index(c) for c in ("parameter", "weight_copy", "activation", "temporary", "workspace", "other")
)
_BACKWARD, _RECOMPUTE = PHASES.index("backward"), PHASES.index("recompute")


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference that still knows which storage it was of when that is gone."""

    __slots__ = ("key",)
    key: int


class Birth(NamedTuple):
    """An allocation when it was made; names are given as indices."""

    size_bytes: int
    module: int
    op: int
    phase: int
    step: int
    micro_batch: int
    born: int


class _Op(NamedTuple):
    """What the tracker needs to know of an operator."""

    code: int
    flops: Callable[..., int] | None
    is_copy: bool
    is_composite: bool
    makes_host_scalar: bool
    takes_workspace: bool


@dataclass
class Allocations:
    """What was seen, in order of birth; `category` and `freed` are filled in later than the rest."""

    births: list[Birth] = field(default_factory=list)
    category: list[int] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    marks: list[tuple[int, int, int, int]] = field(default_factory=list)
    """`(event, phase, step, micro_batch)` whenever one of the last three changes."""
    flops: dict[int, int] = field(default_factory=dict)
    """Floating-point operations of matrix products, convolutions and attention by step (`torch.utils.flop_counter`)."""


class StorageTracker(TorchDispatchMode):
    """Follows every storage that operators create while it is entered.

    Attributes:
        seen: the allocations so far.
        ops: table of the operator names seen; the first is empty, for what no operator made.
        step, micro_batch: where the run is; set by whoever drives it, through `move_to`.
        saw_backward: whether a backward pass has run since the last forward phase began.
    """

    def __init__(
        self,
        modules: ModuleStack,
        *,
        host_scalars: bool,
        execute: Execute | None = None,
        kernels: Kernels | None = None,
        moments: Moments | None = None,
    ) -> None:
        """Prepare to follow; nothing is seen before the tracker is entered.

        Args:
            modules: who is at work.
            host_scalars: a 0-dimensional `torch.tensor(x)` stays on the host, as it does when the device is a GPU.
            execute: runs an operator, `execute(func, args, kwargs)`; None: `func(*args, **kwargs)`.
            kernels: what kernels take inside themselves; None: it is not simulated.
            moments: is told what is seen, for a run on a GPU: then only what is on one is followed.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Allocations()
        self.ops: list[str] = ["", "UntypedStorage.resize_"]
        self._modules, self._host_scalars, self._execute = modules, host_scalars, execute or _run
        self._kernels, self._moments = kernels, moments
        self._kept_workspaces: dict[tuple[bool, str], int] = {}
        self._known_ops: dict[OpOverload, _Op] = {}
        self._known_flops: dict[Any, int] = {}
        self._live: dict[int, tuple[int, _StorageRef]] = {}
        self._hidden: dict[int, _StorageRef] = {}
        self._clock = 0
        self._base_phase = PHASES.index("setup")
        self.step, self.micro_batch, self.saw_backward = -1, 0, False
        self._pending: list[int] = []
        self._module = self._phase = 0
        self._resize = torch.UntypedStorage.resize_
        self._mark(self._base_phase)

    # Where the run is.

    def move_to(self, phase: Phase, step: int, micro_batch: int) -> None:
        """Begin a phase; it lasts until the next call, but for what the autograd engine does of its own."""
        self.step, self.micro_batch, self._base_phase = step, micro_batch, PHASES.index(phase)
        if phase == "forward":
            self.saw_backward = False
        self._mark(self._base_phase)

    def _mark(self, phase: int) -> None:
        mark = (self._clock, phase, self.step, self.micro_batch)
        marks = self.seen.marks
        if marks and marks[-1][0] == self._clock:
            marks[-1] = mark
        elif not marks or marks[-1][1:] != mark[1:]:
            marks.append(mark)
        self._phase = phase
        if self._moments is not None:
            self._moments.mark(self._module, phase, self.step, self.micro_batch)

    def _locate(self) -> None:
        """Find module and phase of what runs now, and notice where a forward pass or a recomputation has ended."""
        if _current_task() < 0:
            phase, self._module = self._base_phase, self._modules.current
        elif torch.is_grad_enabled():  # the engine runs with gradients off: this is a checkpointed region, run again
            phase = _RECOMPUTE
            self._module = self._modules.of_node(_current_node()) if self._modules.is_idle else self._modules.current
        else:
            phase, self.saw_backward = _BACKWARD, True
            self._module = self._modules.of_node(_current_node())
            if self._pending:
                self._keep_activations()
        if phase != self._phase:
            self._mark(phase)

    def _keep_activations(self) -> None:
        """The backward pass goes on: what forward or recomputation made and is still alive, it kept for this."""
        category, freed = self.seen.category, self.seen.freed
        for index in self._pending:
            if freed[index] < 0 and category[index] == _UNKNOWN:
                category[index] = _ACTIVATION
        self._pending.clear()

    # What operators make.

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Dispatch straight here: the wrapper that hides a mode from torch.compile costs as much as the tracking."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device_of and type(args[0]) is FakeTensor:  # the engine asks this several times an operator
            return args[0].fake_device
        for kind in types:
            if kind not in _PLAIN:  # a wrapper subclass first turns into operators on plain tensors
                return NotImplemented
        op = self._known_ops.get(func) or self._learn(func)
        if op.is_composite and torch.is_inference_mode_enabled():  # else autograd has taken it apart, or has a formula
            with self:
                return func.decompose(*args, **(kwargs or {}))
        self._locate()
        kwargs = kwargs or {}
        workspaces = self._kernels(func, args, kwargs) if op.takes_workspace and self._kernels else ()
        held: dict[str, int] = {}
        self._take([w for w in workspaces if w.before_outputs], held, op.code)
        self._begin(op.code)
        out = self._execute(func, args, kwargs)
        if op.flops is not None:
            self.seen.flops[self.step] = self.seen.flops.get(self.step, 0) + self._count_flops(op, args, kwargs, out)
        self._see_outputs(op, args, out)
        self._end()
        self._take([w for w in workspaces if not w.before_outputs], held, op.code)
        for index in held.values():
            self._free(index)
        return out

    def _count_flops(self, op: _Op, args: Any, kwargs: dict[str, Any], out: Any) -> int:
        """Worked out once for every combination of shapes: PyTorch's formulas are slow to call."""
        assert op.flops is not None, "only asked of operators that have a formula"
        key = (op.code, *(a.size() if isinstance(a, Tensor) else a for a in args))
        try:
            known = self._known_flops.get(key)
        except TypeError:  # a list among the arguments, such as the strides of a convolution
            return op.flops(*args, **kwargs, out_val=out)
        if known is None:
            known = self._known_flops[key] = op.flops(*args, **kwargs, out_val=out)
        return known

    def _begin(self, op: int) -> None:
        if self._moments is not None:
            self._moments.begin(op, self._module, self._phase, self.step, self.micro_batch)

    def _end(self) -> None:
        if self._moments is not None:
            self._moments.end()

    def _see_outputs(self, op: _Op, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            if op.makes_host_scalar and out.ndim == 0:
                self.hide(out)
            else:
                self._see(out, op.code, self._copied(args[0]) if op.is_copy else _UNKNOWN)
        elif isinstance(out, (list, tuple)):
            for item in out:
                if isinstance(item, Tensor):
                    self._see(item, op.code, _UNKNOWN)

    def _take(self, workspaces: Sequence[Workspace], held: dict[str, int], op: int) -> None:
        """Take a kernel's workspaces: `held` until it ends, or kept for good, once a thread (autograd has its own)."""
        for workspace in workspaces:
            for name in workspace.frees:
                self._free(held.pop(name))
            if workspace.lifetime == "op":
                held[workspace.name] = self._enter(workspace.size_bytes, op, _WORKSPACE)
            elif (owner := (_current_task() >= 0, workspace.key)) not in self._kept_workspaces:
                self._kept_workspaces[owner] = self._enter(workspace.size_bytes, op, _WORKSPACE)

    def _learn(self, func: OpOverload) -> _Op:
        name = str(func)
        self.ops.append(name)
        op = self._known_ops[func] = _Op(
            code=len(self.ops) - 1,
            flops=flop_registry.get(func._overloadpacket),
            is_copy=name == "aten._to_copy.default",
            is_composite=func.namespace != "prim" and _has_kernel(func.name(), "CompositeImplicitAutograd"),
            makes_host_scalar=self._host_scalars and name == "aten.lift_fresh.default",
            takes_workspace=self._kernels is not None and self._kernels.covers(name),
        )
        return op

    def _copied(self, source: Tensor) -> int:
        live = self._live.get(source.untyped_storage()._cdata)
        return _WEIGHT_COPY if live and self.seen.category[live[0]] == _PARAMETER else _UNKNOWN

    def _see(self, tensor: Tensor, op: int, category: int) -> None:
        if tensor.layout is not torch.strided:
            for part in _parts(tensor):
                self._see(part, op, category)
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        live = self._live.get(key)
        if live is None:
            if key not in self._hidden:
                self._bear(storage, key, op, category)
        elif self._size(live[0]) != storage.nbytes():
            self._replace(storage, key, op)

    def _size(self, index: int) -> int:
        """Bytes a storage holds now: none while it is resized to nothing."""
        return self.seen.births[index].size_bytes if self.seen.freed[index] < 0 else 0

    def _bear(self, storage: torch.UntypedStorage, key: int, op: int, category: int) -> None:
        size = storage.nbytes()
        if size == 0 or (self._moments is not None and not storage.is_cuda):
            return
        ref = _StorageRef(storage, self._die)
        ref.key = key
        self._live[key] = (self._enter(size, op, category, storage), ref)

    def _enter(self, size_bytes: int, op: int, category: int, storage: torch.UntypedStorage | None = None) -> int:
        seen, index = self.seen, len(self.seen.births)
        seen.births.append(Birth(size_bytes, self._module, op, self._phase, self.step, self.micro_batch, self._clock))
        seen.category.append(category)
        seen.freed.append(-1)
        if self._moments is not None and storage is not None:
            self._moments.born(storage.data_ptr())
        self._clock += 1
        if category == _UNKNOWN and self._phase != _BACKWARD:
            self._pending.append(index)
        return index

    def _die(self, ref: weakref.ref[torch.UntypedStorage]) -> None:
        index, _ = self._live.pop(ref.key)  # type: ignore[attr-defined]
        self._free(index)

    def _free(self, index: int) -> None:
        if self.seen.freed[index] < 0:
            self.seen.freed[index] = self._clock
            self._clock += 1

    def _replace(self, storage: torch.UntypedStorage, key: int, op: int) -> None:
        """A resized storage: new memory is taken before the old is given back."""
        index, ref = self._live[key]
        if storage.nbytes():
            self._live[key] = (self._enter(storage.nbytes(), op, self.seen.category[index], storage), ref)
        self._free(index)

    # What others know of storages.

    def own(self, tensor: Tensor, category: Category, *, module: int | None = None) -> None:
        """Say what a tensor's storage is for, and whose it is; one not seen so far is taken in as born now."""
        for part in _parts(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            if key in self._live:
                index = self._live[key][0]
                self.seen.category[index] = CATEGORIES.index(category)
                if module is not None:
                    self.seen.births[index] = self.seen.births[index]._replace(module=module)
            elif key not in self._hidden:
                self._module = module or 0
                self._bear(storage, key, 0, CATEGORIES.index(category))

    def hide(self, tensor: Tensor) -> None:
        """A tensor that is on the host: whatever was seen of it does not count."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            ref = _StorageRef(storage, lambda ref: self._hidden.pop(ref.key, None) and None)
            ref.key = key
            self._hidden[key] = ref

    def __enter__(self) -> StorageTracker:
        tracker, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            tracker._locate()
            tracker._begin(_RESIZE)
            result: torch.UntypedStorage = resize(storage, size)
            if storage._cdata in tracker._live:
                tracker._replace(storage, storage._cdata, _RESIZE)
            tracker._end()
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def settle(self, *, cut_short: bool = False) -> None:
        """Name the rest: temporary if freed within its step, or in it when it was cut short; else it is `other`."""
        never = self.step if cut_short else None
        ends = np.array([mark[0] for mark in self.seen.marks])
        steps = [mark[2] for mark in self.seen.marks]
        for index, category in enumerate(self.seen.category):
            if category != _UNKNOWN:
                continue
            birth, freed = self.seen.births[index], self.seen.freed[index]
            died_in = steps[int(np.searchsorted(ends, freed, side="right")) - 1] if freed >= 0 else never
            self.seen.category[index] = _TEMPORARY if died_in == birth.step else _OTHER
        self._live.clear()
        self._hidden.clear()


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that hold a tensor's memory."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [leaf for leaf in pytree.tree_leaves(_compressed(tensor)) if isinstance(leaf, Tensor)]


def _compressed(tensor: Tensor) -> list[Tensor]:
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    ends = [tensor.crow_indices(), tensor.col_indices()] if rows else [tensor.ccol_indices(), tensor.row_indices()]
    return [*ends, tensor.values()]
