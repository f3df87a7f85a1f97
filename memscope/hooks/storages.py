"""Track the birth and death of every storage, from below autograd.

A dispatch mode sees each operator after autograd and autocast have processed it: its outputs are the tensors that the
device really holds. The tracker follows *storages*, not tensors: views and in-place results share a storage, a resize
replaces its memory. The tracker keeps only weak references, so tracking does not prolong any lifetime.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.hooks.allocations import UNKNOWN, Allocations, Birth
from memscope.hooks.kernels import Kernels, Workspace
from memscope.hooks.modules import ModuleStack
from memscope.hooks.moments import Moments
from memscope.hooks.operators import RESIZE, KnownOperator, Operators
from memscope.hooks.work import NOTHING, CountedOperators, Execute
from memscope.trace import CATEGORIES, PHASES, Category, Phase

__all__ = ["StorageTracker"]

_current_task: Callable[[], int] = torch._C._current_graph_task_id
_current_node: Callable[[], Any] = torch._C._current_autograd_node
_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
_device_of = torch.ops.prim.device.default
_no_function_modes = torch._C.DisableTorchFunction  # function modes would intercept every size query here
_PLAIN = {Tensor, nn.Parameter, FakeTensor}
_PARAMETER, _WEIGHT_COPY, _ACTIVATION, _WORKSPACE = (
    CATEGORIES.index(c) for c in ("parameter", "weight_copy", "activation", "workspace")
)
_FORWARD, _LOSS, _BACKWARD, _RECOMPUTE, _OUTSIDE = (
    PHASES.index(p) for p in ("forward", "loss", "backward", "recompute", "outside")
)
_KEPT = (_FORWARD, _LOSS, _RECOMPUTE)


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference that remembers its storage's key after the storage is gone."""

    __slots__ = ("key",)
    key: int


class StorageTracker(TorchDispatchMode):
    """Follows every storage that operators create while it is entered.

    Attributes:
        seen: the allocations so far.
        ops: table of the operator names seen; the first is empty, for allocations made by no operator.
        step, micro_batch: the position of the run, set by the recorder.
        saw_backward: whether a backward pass has run since the last forward phase began.
        hides: whether the outputs of operators are on the host at the moment; set by a simulation.
        told: whether `run_step` reports phases and inputs, so that they need not be recognized.
    """

    def __init__(
        self,
        modules: ModuleStack,
        *,
        host_scalars: bool,
        execute: Execute | None = None,
        kernels: Kernels | None = None,
        moments: Moments | None = None,
        on_backward: Callable[[], None] = lambda: None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to track; nothing is seen before the tracker is entered.

        Args:
            modules: the stack of running modules.
            host_scalars: whether a 0-dimensional `torch.tensor(x)` stays on the host, as in a run on a GPU.
            execute: runs an operator and returns its work; None: operators run unchanged.
            kernels: the kernel workspace model; None: no workspaces are simulated.
            moments: receives the operators, phases and storages of a run on a GPU; only storages on a GPU are then
                followed.
            on_backward: called when a backward pass begins, before any of its operators is seen.
            after_backward: called at the first operator after a backward pass.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Allocations()
        self._operators = Operators(host_scalars=host_scalars, kernels=kernels)
        self.ops = self._operators.names
        self._modules, self._execute = modules, execute or CountedOperators()
        self._kernels, self._moments = kernels, moments
        self._on_backward, self._after_backward = on_backward, after_backward
        self._kept_workspaces: dict[tuple[bool, str], int] = {}
        self._live: dict[int, tuple[int, _StorageRef]] = {}
        self._hidden: dict[int, _StorageRef] = {}
        self.hides = False
        self._clock = 0
        self._base_phase = PHASES.index("setup")
        self.step, self.micro_batch, self.saw_backward, self.told = -1, 0, False, False
        self._pending: list[int] = []
        self._unread: set[int] = set()
        self._in_backward = self._is_recorded = False
        self._last_node = 0
        self._module = self._phase = 0
        self._resize = torch.UntypedStorage.resize_
        self._mark(self._base_phase)

    # The position of the run.

    def move_to(self, phase: Phase, step: int, micro_batch: int) -> None:
        """Begin a phase. It lasts until the next call, except for work of the autograd engine."""
        self.step, self.micro_batch, self._base_phase = step, micro_batch, PHASES.index(phase)
        if phase == "forward":
            self.saw_backward = False
        self._last_node = _sequence_number()
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
        """Find the running module and phase, and detect the end of a forward pass or recomputation."""
        if _current_task() < 0:
            if self._in_backward:
                self._in_backward = False
                self._after_backward()
            phase, self._module = self._base_phase, 0 if self._modules.is_idle else self._modules.current
            if phase == _OUTSIDE:
                self._notice_record()
        elif torch.is_grad_enabled():  # the engine runs with gradients disabled: this is a recomputed region
            phase = _RECOMPUTE
            self._module = self._modules.of_node(_current_node()) if self._modules.is_idle else self._modules.current
        else:
            if not self._in_backward:
                self._in_backward = True
                self._on_backward()
            phase, self.saw_backward = _BACKWARD, True
            self._module = self._modules.of_node(_current_node())
            if self._pending:
                self._keep_activations()
        if phase != self._phase:
            self._mark(phase)

    def _notice_record(self) -> None:
        """Note whether autograd records the running operator: it then has just numbered a node.

        Source: torch/csrc/autograd/function.h.
        """
        last, self._last_node = self._last_node, _sequence_number()
        self._is_recorded = self._last_node > last

    def _serves_backward(self) -> bool:
        """Whether autograd may keep an allocation made now."""
        return self._phase in _KEPT or (self._phase == _OUTSIDE and self._is_recorded)

    def _keep_activations(self) -> None:
        """Categorize as activation what forward or recomputation made and is still alive in the backward pass."""
        category, freed = self.seen.category, self.seen.freed
        for index in self._pending:
            if freed[index] < 0 and category[index] == UNKNOWN:
                category[index] = _ACTIVATION
        self._pending.clear()

    # Allocations of operators.

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Dispatch directly: the wrapper that hides a mode from torch.compile costs as much as the tracking itself."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device_of and type(args[0]) is FakeTensor:  # the engine queries this several times per operator
            return args[0].fake_device
        for kind in types:
            if kind not in _PLAIN:  # a wrapper subclass first unwraps itself into operators on plain tensors
                return NotImplemented
        op = self._operators.known.get(func) or self._operators.learn(func)
        if op.is_composite and torch.is_inference_mode_enabled():  # else autograd has decomposed it, or has a formula
            with self:
                return func.decompose(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        held: dict[str, int] = {}
        with _no_function_modes():
            self._locate()
            if not self.told and torch.is_grad_enabled() and self._serves_backward():
                self._note_reads((*args, *kwargs.values()))
            workspaces = self._kernels(func, args, kwargs) if op.takes_workspace and self._kernels else ()
            self._take([w for w in workspaces if w.before_outputs], held, op.code)
            self._begin(op.code)
        out, work = self._execute(func, args, kwargs)
        if work is not NOTHING:
            self.seen.work.add((self.step, self.micro_batch, self._phase, self._module, op.code), work)
        with _no_function_modes():
            self._see_outputs(op, args, self._as_born(func, args, kwargs, out) if op.has_own_order else out)
            self._end()
            self._take([w for w in workspaces if not w.before_outputs], held, op.code)
        for index in held.values():
            self._free(index)
        return out

    def _note_reads(self, values: Sequence[Any]) -> None:
        """Categorize as `input` what the forward pass or loss reads, if made outside them or before the recording."""
        for value in values:
            if isinstance(value, Tensor) and value.layout is torch.strided:
                key = value.untyped_storage()._cdata
                if key not in self._live or key in self._unread:
                    self.own(value, "input")
            elif isinstance(value, (list, tuple)):
                self._note_reads(value)

    def _begin(self, op: int) -> None:
        if self._moments is not None:
            self._moments.begin(op, self._module, self._phase, self.step, self.micro_batch)

    def _end(self) -> None:
        if self._moments is not None:
            self._moments.end()

    def _as_born(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """The results that the kernel makes on the device, in its order; hides the results it leaves on the host."""
        order = self._kernels.born(func, args, kwargs) if self._kernels else None
        if order is None:
            return out
        for index, item in enumerate(out):
            if index not in order and isinstance(item, Tensor):
                self.hide(item)
        return [out[index] for index in order]

    def _see_outputs(self, op: KnownOperator, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            if self.hides or (op.makes_host_scalar and out.ndim == 0):
                self.hide(out)
            else:
                self._see(out, op.code, self._copied(args[0]) if op.is_copy else UNKNOWN)
        elif isinstance(out, (list, tuple)):
            for item in out:
                if isinstance(item, Tensor):
                    self._see(item, op.code, UNKNOWN)

    def _take(self, workspaces: Sequence[Workspace], held: dict[str, int], op: int) -> None:
        """Allocate a kernel's workspaces: `held` until it ends, or kept, once per thread (autograd has its own)."""
        for workspace in workspaces:
            for name in workspace.frees:
                self._free(held.pop(name))
            if workspace.lifetime == "op":
                held[workspace.name] = self._enter(workspace.size_bytes, op, _WORKSPACE)
            elif (owner := (_current_task() >= 0, workspace.key)) not in self._kept_workspaces:
                self._kept_workspaces[owner] = self._enter(workspace.size_bytes, op, _WORKSPACE)

    def _copied(self, source: Tensor) -> int:
        live = self._live.get(source.untyped_storage()._cdata)
        return _WEIGHT_COPY if live and self.seen.category[live[0]] == _PARAMETER else UNKNOWN

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
        """Bytes of a storage now; 0 while it is resized to zero."""
        return self.seen.births[index].size_bytes if self.seen.freed[index] < 0 else 0

    def _bear(self, storage: torch.UntypedStorage, key: int, op: int, category: int) -> None:
        size = storage.nbytes()
        if size == 0 or (self._moments is not None and not storage.is_cuda):
            return
        ref = _StorageRef(storage, self._die)
        ref.key = key
        index = self._enter(size, op, category, storage)
        self._live[key] = (index, ref)
        if category == UNKNOWN and self._phase == _OUTSIDE and not self._is_recorded:
            self._unread.add(key)

    def _enter(self, size_bytes: int, op: int, category: int, storage: torch.UntypedStorage | None = None) -> int:
        seen, index = self.seen, len(self.seen.births)
        seen.births.append(Birth(size_bytes, self._module, op, self._phase, self.step, self.micro_batch, self._clock))
        seen.category.append(category)
        seen.freed.append(-1)
        if self._moments is not None and storage is not None:
            self._moments.born(storage.data_ptr())
        self._clock += 1
        if category == UNKNOWN and self._serves_backward():
            self._pending.append(index)
        return index

    def _die(self, ref: weakref.ref[torch.UntypedStorage]) -> None:
        key = ref.key  # type: ignore[attr-defined]
        index, _ = self._live.pop(key)
        self._unread.discard(key)
        self._free(index)

    def _free(self, index: int) -> None:
        if self.seen.freed[index] < 0:
            self.seen.freed[index] = self._clock
            self._clock += 1

    def _replace(self, storage: torch.UntypedStorage, key: int, op: int) -> None:
        """Record a resize: new memory is allocated before the old memory is freed."""
        index, ref = self._live[key]
        if storage.nbytes():
            self._live[key] = (self._enter(storage.nbytes(), op, self.seen.category[index], storage), ref)
        self._free(index)

    # Interface for other parts: queries, and knowledge about storages.

    @property
    def clock(self) -> int:
        """Number of the next event."""
        return self._clock

    def index_of(self, tensor: Tensor) -> int | None:
        """Index of the allocation that holds a tensor now; None if it is not tracked."""
        live = self._live.get(tensor.untyped_storage()._cdata)
        return live[0] if live else None

    def own(self, tensor: Tensor, category: Category, *, module: int | None = None) -> None:
        """Set the category and module of a tensor's storage; a storage not seen before is born now."""
        for part in _parts(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            self._unread.discard(key)
            if key in self._live:
                index = self._live[key][0]
                self.seen.category[index] = CATEGORIES.index(category)
                if module is not None:
                    self.seen.births[index] = self.seen.births[index]._replace(module=module)
            elif key not in self._hidden:
                at_work, self._module = self._module, module or 0
                self._bear(storage, key, 0, CATEGORIES.index(category))
                self._module = at_work

    def hide(self, tensor: Tensor) -> None:
        """Ignore a tensor that is on the host, unless its storage is already tracked."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            ref = _StorageRef(storage, lambda ref: self._hidden.pop(ref.key, None) and None)
            ref.key = key
            self._hidden[key] = ref

    def is_hidden(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the host."""
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._hidden

    def __enter__(self) -> StorageTracker:
        tracker, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            tracker._locate()
            tracker._begin(RESIZE)
            result: torch.UntypedStorage = resize(storage, size)
            if storage._cdata in tracker._live:
                tracker._replace(storage, storage._cdata, RESIZE)
            tracker._end()
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def settle(self, *, cut_short: bool = False) -> None:
        """Categorize the remaining allocations: `temporary` if freed within their step, else `other`.

        If the run was cut short, allocations alive at its end count as freed in its last step.
        """
        self.seen.settle(never_freed_in=self.step if cut_short else None)
        self._live.clear()
        self._hidden.clear()


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
