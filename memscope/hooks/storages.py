"""Track the storages that operators create, from below autograd.

A dispatch mode sees each operator after autograd and autocast have processed it: its outputs are the tensors that the
device really holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.hooks.allocations import UNKNOWN, Allocations
from memscope.hooks.distributed import shapes_of_dtensors_ignored
from memscope.hooks.kernels import Kernels, Workspace
from memscope.hooks.lifetimes import Lifetimes
from memscope.hooks.modules import ModuleStack
from memscope.hooks.moments import Moments
from memscope.hooks.operators import RESIZE, KnownOperator, Operators
from memscope.hooks.parts import PLAIN
from memscope.hooks.position import Position
from memscope.hooks.work import NOTHING, CountedFlops, Execute
from memscope.trace import CATEGORIES

__all__ = ["StorageTracker"]

_current_task: Callable[[], int] = torch._C._current_graph_task_id
_device_of = torch.ops.prim.device.default
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_no_function_modes = torch._C.DisableTorchFunction  # function modes would intercept every size query here
_WEIGHT_COPY, _WORKSPACE = CATEGORIES.index("weight_copy"), CATEGORIES.index("workspace")


class StorageTracker(TorchDispatchMode):
    """Follows every storage that operators create while it is entered.

    Attributes:
        seen: the allocations so far.
        position: where the run is.
        lifetimes: the storages that are alive.
        ops: table of the operator names seen; the first is empty, for allocations made by no operator.
        notes: what operators seen mean for the trace as a whole.
        hides: whether the outputs of operators are on the host at the moment; set by a simulation.
        pins: whether they are in pinned memory there.
        follows: whether they belong to the step, though nothing that they are made from does.
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
            on_backward: see `Position`.
            after_backward: see `Position`.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Allocations()
        self.position = Position(modules, self.seen, moments, on_backward=on_backward, after_backward=after_backward)
        self.lifetimes = Lifetimes(self.seen, self.position, moments)
        self._operators = Operators(host_scalars=host_scalars, kernels=kernels)
        self.ops, self.notes = self._operators.names, self._operators.notes
        if moments is not None:
            moments.name_with(self.ops, modules.names)
        self._known, self._see = self._operators.known, self.lifetimes.see
        self._execute, self._count = execute, CountedFlops()
        self._kernels, self._moments = kernels, moments
        self._kept_workspaces: set[tuple[bool, str]] = set()
        self.hides = self.pins = self.follows = self._is_paused = False
        self._is_plain = execute is None and kernels is None and moments is None
        self._scopes = contextlib.ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Dispatch directly: the wrapper that hides a mode from torch.compile costs as much as the tracking itself."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = self._known.get(id(func))
        if op is not None and op.is_plain and self._is_plain and not types and not _function_modes():
            # Most operators of a real run: what follows is the same without everything that they do not need.
            here = self.position
            here.locate()
            if here.serves_backward and not here.told and torch.is_grad_enabled():
                self.lifetimes.own_inputs((*args, *kwargs.values()) if kwargs else args)
            out = op.run(*args, **kwargs) if kwargs else op.run(*args)
            if isinstance(out, Tensor):
                self._see(out, op.code, UNKNOWN)
            else:
                self._see_outputs(op, args, out)
            return out
        if func is _device_of and type(args[0]) is FakeTensor:  # the engine queries this several times per operator
            return args[0].fake_device
        if not PLAIN.issuperset(types):  # a wrapper subclass first unwraps itself into operators on plain tensors
            return NotImplemented
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        op = op or self._operators.learn(func)
        if op.is_composite:
            with self._dispatching():
                return func.decompose(*args, **kwargs)
        held: dict[str, int] = {}
        here, moments = self.position, self._moments
        with _no_function_modes():
            here.locate()
            if here.serves_backward and not here.told and torch.is_grad_enabled():
                self.lifetimes.own_inputs((*args, *kwargs.values()))
            workspaces = self._kernels(func, args, kwargs) if op.takes_workspace and self._kernels else ()
            if workspaces:
                self._take([w for w in workspaces if w.before_outputs], held, op.code)
            if moments is not None:
                moments.begin(op.code, here.module, here.phase, here.step, here.micro_batch)
        if self._execute is not None:
            out, work = self._execute(func, args, kwargs)
        else:
            out = op.run(*args, **kwargs)
            work = self._count(func, args, kwargs, out) if op.has_flops else NOTHING
        if work is not NOTHING:
            self.seen.work.add((here.step, here.micro_batch, here.phase, here.module, op.code), work)
        with _no_function_modes():
            if op.is_special or self.hides or not isinstance(out, Tensor):
                self._see_outputs(op, args, self._as_born(func, args, kwargs, out) if op.has_own_order else out)
            else:
                self._see(out, op.code, UNKNOWN)
            if moments is not None:
                moments.end()
            if workspaces:
                self._take([w for w in workspaces if not w.before_outputs], held, op.code)
        for index in held.values():
            self.seen.free(index)
        return out

    def _as_born(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """The results that the kernel makes on the device, in its order; hides the results it leaves on the host."""
        order = self._kernels.born(func, args, kwargs) if self._kernels else None
        if order is None:
            return out
        for index, item in enumerate(out):
            if index not in order and isinstance(item, Tensor):
                self.lifetimes.hide(item)
        return [out[index] for index in order]

    def _see_outputs(self, op: KnownOperator, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            if self.hides:
                self.lifetimes.hide_result(out, op.code, args, pinned=self.pins, followed=self.follows)
            elif op.makes_host_scalar and out.ndim == 0:
                self.lifetimes.hide(out)
            else:
                is_copy = op.is_copy and self.lifetimes.is_parameter(args[0])
                self._see(out, op.code, _WEIGHT_COPY if is_copy else UNKNOWN)
        elif isinstance(out, (list, tuple)):
            for item in out:
                if isinstance(item, Tensor) and self.hides:
                    self.lifetimes.hide_result(item, op.code, args, pinned=self.pins, followed=self.follows)
                elif isinstance(item, Tensor):
                    self._see(item, op.code, UNKNOWN)

    def _take(self, workspaces: Sequence[Workspace], held: dict[str, int], op: int) -> None:
        """Allocate a kernel's workspaces: `held` until it ends, or kept, once per thread (autograd has its own)."""
        for workspace in workspaces:
            for name in workspace.frees:
                self.seen.free(held.pop(name))
            if workspace.lifetime == "op":
                held[workspace.name] = self.lifetimes.enter(workspace.size_bytes, op, _WORKSPACE)
            elif (owner := (_current_task() >= 0, workspace.key)) not in self._kept_workspaces:
                self._kept_workspaces.add(owner)
                self.lifetimes.enter(workspace.size_bytes, op, _WORKSPACE)

    def __enter__(self) -> StorageTracker:
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(self.position)
            scopes.enter_context(self._resizes())
            scopes.enter_context(shapes_of_dtensors_ignored(self._paused))
            scopes.enter_context(self._dispatching())
            self._scopes = scopes.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scopes.__exit__(*exception)

    @contextlib.contextmanager
    def _dispatching(self) -> Iterator[None]:
        """See operators. Unlike the tracker itself, this can be entered again, where PyTorch has taken it off."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _resizes(self) -> Iterator[None]:
        """See resizes of storages, which are no operators."""
        tracker, resize = self, torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            here, moments = tracker.position, tracker._moments
            here.locate()
            if moments is not None:
                moments.begin(RESIZE, here.module, here.phase, here.step, here.micro_batch)
            result: torch.UntypedStorage = resize(storage, size)
            tracker.lifetimes.resized(storage, RESIZE)
            if moments is not None:
                moments.end()
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Run operators unseen."""
        before = self._is_paused, self._is_plain
        self._is_paused, self._is_plain = True, False
        try:
            yield
        finally:
            self._is_paused, self._is_plain = before

    def settle(self, *, cut_short: bool = False) -> None:
        """Categorize the remaining allocations: `temporary` if freed within their step, else `other`.

        If the run was cut short, allocations alive at its end count as freed in its last step.
        """
        self.seen.settle(never_freed_in=self.position.step if cut_short else None)
        self.lifetimes.end()
