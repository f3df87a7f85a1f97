"""Watch a training loop and record its Trace.

Simulation, measurement and users' own loops all use this recorder.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memscope.errors import MemscopeError, UsageError
from memscope.hooks.calls import ModuleCalls
from memscope.hooks.compiled import RAN_EAGERLY, compiled_runs_eagerly
from memscope.hooks.device import watch_of
from memscope.hooks.kernels import Kernels
from memscope.hooks.modules import ModuleStack, class_of
from memscope.hooks.optimizer import GradientNamer, OptimizerNamer
from memscope.hooks.out_of_memory import is_out_of_memory
from memscope.hooks.paged import paged_note
from memscope.hooks.storages import StorageTracker
from memscope.hooks.versions import note_untested, versions
from memscope.hooks.work import Execute, WorkDone
from memscope.trace import MARK_COLUMNS, Phase, Trace, columns_of
from memscope.trace.notes import add_note
from memscope.workload.batch import tensors_in
from memscope.workload.quantized import elements, scales_of

__all__ = ["Recorder"]

_recording = threading.Lock()


@contextlib.contextmanager
def _the_only_recording() -> Iterator[None]:
    """Refuse a second recording while one runs: the hooks of both would see, and count, the same modules and steps.

    Raises:
        UsageError: another recorder is entered.
    """
    if not _recording.acquire(blocking=False):
        raise UsageError(
            "a Recorder is already recording in this process, and each sees everything: "
            "leave it before you enter another"
        )
    try:
        yield
    finally:
        _recording.release()


class Recorder:
    """Records every allocation made while it is entered, with category, module, phase and operator.

    If the model's parameters are on a CUDA device when the recorder is created, the recorder records every block of
    PyTorch's allocator on that device, including those allocated inside kernels. Running out of memory ends the
    recording but keeps the trace: `meta["out_of_memory"]` describes the failed request.

    The recorder recognizes phases, steps and micro-batches: a forward pass by a call of the model, or of one of its
    modules, with gradients enabled; a backward pass by the autograd engine; the optimizer by its `step`; `inference` by
    a call of the model without gradients between two steps. Everything else is `outside`. A step ends after
    `optimizer.step()`, when the next forward pass begins.

    A recorder is also a `StepObserver`: `run_step` reports the phases that cannot be recognized. Hooks are removed on
    leaving, also after an exception; only training changes the model.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memscope import Recorder
        >>> model = nn.Linear(1024, 1024, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with Recorder(model, optimizer) as recorder:
        ...     for _ in range(2):
        ...         model(torch.randn(8, 1024)).mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> trace = recorder.trace()
        >>> trace.by("category", at="peak")["parameter"]
        4194304
    """

    _optimizer: torch.optim.Optimizer | None
    _calls: ModuleCalls | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
        on_gpu: bool = False,
        execute: Execute | None = None,
        kernels: Kernels | None = None,
        calls_of: Collection[str] = (),
    ) -> None:
        """Prepare to record; nothing is watched before the recorder is entered.

        Args:
            model: the model whose modules and parameters are named in the trace.
            optimizer: an optimizer whose existing state to include; the steps of all optimizers are seen in any case.
            meta: further entries for the trace's `meta`, beside versions and parameter counts; JSON values.
            on_gpu: whether the tensors stand for tensors on a GPU, so that step counters may be on the host.
            execute: runs an operator in place of PyTorch, and returns its work.
            kernels: the kernel workspace model, for simulated kernels; None: no workspaces are simulated.
            calls_of: names of modules whose calls are recorded in `meta["calls"]`; see `hooks.calls.ModuleCalls`.
        """
        if not isinstance(model, nn.Module):
            raise UsageError(f"Recorder expects an nn.Module but got a {type(model).__name__}: pass the model")
        device = next((parameter.device for parameter in model.parameters()), None)
        self._prepare(model, device=device, meta=meta, on_gpu=on_gpu, execute=execute, kernels=kernels)
        self._optimizer: torch.optim.Optimizer | None = optimizer
        self._calls: ModuleCalls | None = ModuleCalls(model, calls_of, self._tracker)

    def _prepare(
        self,
        *models: nn.Module,
        device: torch.device | None,
        meta: Mapping[str, Any] | None,
        on_gpu: bool,
        execute: Execute | None,
        kernels: Kernels | None,
        fake_mode: FakeTensorMode | None = None,
        follows_real: bool = True,
        name_of: Callable[[str], str] = lambda name: name,
    ) -> None:
        self._meta, self._fake_mode, self._follows_real = dict(meta or {}), fake_mode, follows_real
        self._modules = ModuleStack(
            *models,
            on_call=self._call_begins,
            on_return=self._call_ends,
            on_unknown=self._unknown_call_begins,
            name_of=name_of,
        )
        self._optimizer = None
        self._watch = watch_of(device)
        self._ran_out: bool | None = False
        self._tracker = tracker = StorageTracker(
            self._modules,
            host_scalars=on_gpu,
            execute=execute,
            kernels=kernels,
            moments=self._watch.moments if self._watch else None,
            on_backward=self._backward_begins,
            after_backward=self._backward_ended,
        )
        self._position, self._lifetimes = tracker.position, tracker.lifetimes
        self._gradients = GradientNamer(self._lifetimes, self._modules)
        self._optimizers = OptimizerNamer(
            self._lifetimes, self._modules, before=self._optimizer_begins, after=self._optimizer_ends, on_gpu=on_gpu
        )
        self._calls = None
        self._scopes = contextlib.ExitStack()
        self._step_done, self._model_returned = True, False
        self._before_inference: Phase | None = None
        self._around_optimizer: Phase | None = None
        self._has_begun = self._in_optimizer = False
        self._stepped: set[int] = set()
        self._seconds: list[float] = []
        self._began = 0.0

    def __enter__(self) -> Recorder:
        if self._has_begun:
            raise UsageError("this Recorder has already been entered: create a new Recorder for each recording")
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(_the_only_recording())
            self._has_begun = True
            self._lifetimes.begin(self._fake_mode, follows_real=self._follows_real)
            self._take_in()
            note_untested(self._meta)
            scopes.enter_context(compiled_runs_eagerly(lambda: add_note(self._meta, RAN_EAGERLY)))
            if self._watch:
                scopes.enter_context(self._watch)
            for part in (self._modules, self._gradients, self._optimizers, self._calls, self._tracker):
                scopes.enter_context(part or contextlib.nullcontext())
            self._scopes = scopes.pop_all()
        self._position.move_to("outside", -1, 0)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._ran_out = self._has_run_out(exception[1])
        self._end_step(wait=exception[1] is None)
        self._scopes.__exit__(*exception)
        self._tracker.settle(cut_short=self._ran_out is not False)

    def _has_run_out(self, error: BaseException | None) -> bool | None:
        """Whether running out of memory ended the recording; None: perhaps (see `DeviceWatch.trace`)."""
        return is_out_of_memory(error)

    def _take_in(self) -> None:
        """Register existing memory: weights, buffers, and gradients and optimizer state of an earlier step."""
        for model in self._modules.models.values():
            self._take_in_model(model)
        if self._optimizer is not None:
            self._optimizers.name_state(self._optimizer)

    def _take_in_model(self, model: nn.Module) -> None:
        self._take_in_parameters(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._lifetimes.own(parameter.grad, "gradient", module=self._modules.of_parameter(parameter))
        for module in model.modules():
            code = self._modules.of_module(module)
            for buffer in module.buffers(recurse=False):
                self._lifetimes.own(buffer, "buffer", module=code)
            for scales in scales_of(module).values():
                self._lifetimes.own(scales, "parameter", module=code)
        for module in model.modules():
            for value in vars(module).values():  # constants that are not registered as buffers
                if isinstance(value, Tensor):
                    self._lifetimes.own(value, "buffer", module=self._modules.of_module(module))

    def _take_in_parameters(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            self._lifetimes.own(parameter, "parameter", module=self._modules.of_parameter(parameter))

    # Phases reported by run_step.

    def phase(self, name: str, micro_batch: int) -> None:
        """Begin a phase reported by `run_step`."""
        self._position.told = True
        if name in ("forward", "inference") and micro_batch == 0:
            self._begin_step()
        phase: Phase = name  # type: ignore[assignment]
        self._position.move_to(phase, self._position.step, micro_batch)

    def inputs(self, data: Any) -> None:
        """Categorize the tensors of a micro-batch as `input`."""
        for tensor in tensors_in(data):
            self._lifetimes.own(tensor, "input")

    # Phases recognized by the recorder.

    def _unknown_call_begins(self, module: nn.Module) -> None:
        """The training loop calls a module that belongs to none of the models."""

    def _call_begins(self, whole: bool) -> None:
        here = self._position
        if here.told and here.base_phase in ("inference", "outside"):
            self._before_inference = "outside"
            self._move_to("inference")
        elif here.told:
            if whole:
                self._move_to("forward")
        elif torch.is_grad_enabled():
            if self._step_done:
                self._begin_step()
            elif here.saw_backward:
                here.micro_batch += 1
            self._move_to("forward")
        elif self._step_done:  # validation or generation; within a step, it is a part of the step
            self._before_inference = here.base_phase
            self._move_to("inference")

    def _call_ends(self, whole: bool) -> None:
        if self._before_inference is not None:
            self._move_to(self._before_inference)
            self._before_inference = None
        elif self._position.told or torch.is_grad_enabled():
            self._model_returned |= whole
            if self._model_returned and (whole or not self._position.told):
                self._move_to("loss")

    def _backward_begins(self) -> None:
        if self._step_done and not self._position.told:  # after a forward pass that called no module
            self._begin_step()

    def _backward_ended(self) -> None:
        if not self._position.told:
            self._model_returned = False
            self._move_to("optimizer" if self._in_optimizer else "outside")

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer) -> None:
        of_unseen_gradients = self._position.step < 0 or id(optimizer) in self._stepped
        if of_unseen_gradients and not self._position.told:
            self._begin_step()
        here = self._position
        self._around_optimizer = here.base_phase if here.is_in_backward else None
        self._in_optimizer, here.optimizes = True, here.is_in_backward  # a closure may run a backward pass of its own
        self._move_to("optimizer")

    def _optimizer_ends(self, optimizer: torch.optim.Optimizer) -> None:
        here = self._position
        self._stepped.add(id(optimizer))
        self._in_optimizer, self._step_done = False, True
        here.optimizes = False
        if self._around_optimizer is not None:
            self._move_to(self._around_optimizer)
        elif not here.told:
            self._move_to("outside")

    def _move_to(self, phase: Phase) -> None:
        self._position.move_to(phase, self._position.step, self._position.micro_batch)

    def _begin_step(self) -> None:
        self._end_step()
        self._step_done = False
        self._stepped.clear()
        self._position.step, self._position.micro_batch = self._position.step + 1, 0
        self._began = time.perf_counter()
        if not self._position.told:  # weights may have been unfrozen, added or converted since
            self._modules.refresh()
            for model in self._modules.models.values():
                self._take_in_parameters(model)
            self._gradients.refresh()

    def _end_step(self, *, wait: bool = True) -> None:
        if self._watch and wait:  # a device runs asynchronously; after an error it may not respond
            self._watch.synchronize()
        if self._position.step >= 0 and len(self._seconds) <= self._position.step:
            self._seconds.append(time.perf_counter() - self._began)

    @property
    def tracker(self) -> StorageTracker:
        """The tracker that follows the storages."""
        return self._tracker

    @property
    def is_on_gpu(self) -> bool:
        """Whether the recorder records a real GPU."""
        return self._watch is not None

    @property
    def work(self) -> WorkDone:
        """The work of all operators so far."""
        return self._tracker.seen.work

    def trace(self) -> Trace:
        """The trace of everything recorded; called after leaving the recorder.

        Raises:
            MemscopeError: nothing was recorded.
        """
        seen = self._tracker.seen
        if self._watch:
            return self._watch.trace(
                seen,
                modules=self._modules.names,
                ops=self._tracker.ops,
                meta=self._finished_meta(),
                ran_out=self._ran_out,
            )
        if not seen.births:
            raise MemscopeError("nothing was recorded: no tensor was created between entering and leaving the recorder")
        births = columns_of(("size", "module", "op", "phase", "step", "micro_batch", "born"), seen.births)
        host, modules, ops = self._lifetimes.host, tuple(self._modules.names), tuple(self._tracker.ops)
        return Trace(
            **births,
            requested=births["size"],
            category=np.array(seen.category, dtype=np.int64),
            freed=np.array(seen.freed, dtype=np.int64),
            **columns_of(MARK_COLUMNS, seen.marks),
            modules=modules,
            ops=ops,
            meta=self._finished_meta(),
            host=host.trace(modules, ops) if host else None,
        )

    def _finished_meta(self) -> dict[str, Any]:
        meta = self._run_meta()
        for note in self._tracker.notes:
            add_note(meta, note)
        if self._optimizers.paged_bytes:
            add_note(meta, paged_note(self._optimizers.paged_bytes))
        return meta

    def _run_meta(self) -> dict[str, Any]:
        parameters = list({id(p): p for model in self._modules.models.values() for p in model.parameters()}.values())
        steps = range(self._position.step + 1)
        return {
            "versions": versions(),
            "parameters": {
                "total": sum(map(elements, parameters)),
                "trainable": sum(elements(p) for p in parameters if p.requires_grad),
            },
            "models": {name: class_of(model) for name, model in self._modules.models.items()},
            "flops": [self.work.flops_of_step(step) for step in steps],
            "seconds": self._seconds,
            **({"calls": self._calls.rows} if self._calls and self._calls.rows else {}),
            **self._meta,
        }
