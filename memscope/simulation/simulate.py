"""Simulation of a workload: training steps on tensors without data. A 7B model needs neither a GPU nor its memory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

from memscope.allocator.settings import AllocatorSettings
from memscope.errors import TargetError, UsageError, where
from memscope.hooks.live_state import Tell
from memscope.hooks.parts import is_wrapper, parts_of
from memscope.hooks.recorder import Recorder
from memscope.hooks.run import MicroBatchProgress, run_meta, run_steps
from memscope.simulation.answers import Answers, FollowedValues
from memscope.simulation.assumptions import Assume, Assumptions
from memscope.simulation.autograd_engine import PlainAutograd
from memscope.simulation.cuda.kernel_results import results
from memscope.simulation.cuda.semantics import cuda_semantics, fake_tensors_use_foreach
from memscope.simulation.device_memory import KernelWorkspaces, on_device
from memscope.simulation.devices.catalogue import Device, get_device
from memscope.simulation.devices.cost import cost_table
from memscope.simulation.devices.roofline import Roofline
from memscope.simulation.devices.timeline import Timeline
from memscope.simulation.facade.imports import imports_see_the_machine
from memscope.simulation.facade.visible_gpu import VisibleGpu
from memscope.simulation.fake_tensors import FakeCopies, StandIns, fake_tensors_train, weight_sizes
from memscope.simulation.host import HostKernels, HostOperators, Link, PinnedBefore, host_copies
from memscope.simulation.machine.libraries import ChangedLibraries
from memscope.simulation.packages.bitsandbytes import BitsandbytesKernels
from memscope.simulation.packages.paged import HostTensors, paged_state
from memscope.simulation.packages.visible import VisiblePackages
from memscope.simulation.refusal import NotSimulated
from memscope.simulation.remember import RememberedOperators
from memscope.simulation.untouched import Untouched
from memscope.simulation.values import KnownValues
from memscope.simulation.written_views import WrittenViews
from memscope.strategies import Plan
from memscope.trace import Trace
from memscope.trace.notes import add_note
from memscope.workload.batch import map_tensors
from memscope.workload.building import build_workload, usable
from memscope.workload.description import Workload
from memscope.workload.inference import started
from memscope.workload.micro_batches import Choose, prepare_steps

__all__ = ["Part", "simulate"]


@dataclass(frozen=True)
class Part:
    """What the advisor wants of a simulation: some micro-batches, and the calls of some modules."""

    micro_batches: Choose = list
    """Selects the micro-batches of a step to run."""
    calls_of: Collection[str] = ()
    """Names of modules whose calls are recorded in `meta["calls"]`."""


def simulate(
    workload: Workload | Callable[[], Workload],
    *,
    device: str | Device = "gpu",
    strategies: str | Plan = "",
    steps: int = 2,
    allocator: AllocatorSettings | None = None,
    progress: MicroBatchProgress | None = None,
    live: Tell | None = None,
    assume: str | Assume = "",
    part: Part | None = None,
) -> Trace:
    """Trace `steps` steps of training, or of inference, without computing any values.

    Args:
        workload: the workload to train, or a function that builds it. The weights of a model that the function builds
            take no memory; a `Workload` is copied and left unchanged.
        device: a name that `memscope devices` lists: `gpu` (an NVIDIA GPU without a memory limit), a specific GPU, or
            `cpu`.
        strategies: a plan such as `lora:r=8,amp`, applied before the first step.
        steps: number of optimizer steps to trace; the optimizer state exists from the second step on.
        allocator: settings of PyTorch's caching allocator; None: read from `PYTORCH_CUDA_ALLOC_CONF`.
        progress: called after each micro-batch as `progress(done, total)`.
        live: called with a `memscope.hooks.live_state.LiveState` when a phase begins, and at the end. Its sizes are
            requested bytes; only the trace rounds them to the device's blocks.
        assume: what to do about values that nobody can know before a run: `refuse` ends the simulation, and
            `experts=worst` sends all tokens to the same experts; the default spreads them evenly. What was assumed is
            in `meta["assumptions"]`.
        part: runs a part of each step, and records more of it; None: all of it.

    Returns:
        The trace. Its sizes are those of the blocks that PyTorch's allocator would return on the device, workspaces of
        kernels included. `meta["out_of_memory"]` says where the device would run out of memory, or is None.
        `meta["cost"]` is the estimated time, in the form that `memscope.analysis.cost` reads, or None where the
        device's rates are unknown.

    Raises:
        TargetError: the target's code fails, or needs values that are neither known nor assumed.
        UsageError: the strategies, the device, the data or `assume` cannot be used.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memscope import Workload, simulate
        >>> def build():
        ...     return Workload(
        ...         model=nn.Linear(1024, 1024, bias=False),
        ...         batches=[torch.randn(8, 1024)],
        ...         loss=lambda model, x: model(x).square().mean(),
        ...         optimizer_factory=torch.optim.AdamW,
        ...     )
        >>> trace = simulate(build, device="a100-40gb")
        >>> trace.peak.phase
        'optimizer'
        >>> trace.by("category", at="peak")["optimizer_state"]  # two moments of 1024 * 1024 float32
        8388608
    """
    device = get_device(device) if isinstance(device, str) else device
    plan = Plan.parse(strategies) if isinstance(strategies, str) else strategies
    settings = AllocatorSettings.asked(allocator)
    kernels = KernelWorkspaces(device) if device.kind == "cuda" else None
    roofline = Roofline(device)
    mode = StandIns(allow_non_fake_inputs=True)
    gpu = VisibleGpu(device, settings)
    gpu.memory.built = partial(weight_sizes, mode)
    assumptions = Assumptions(Assume.parse(assume) if isinstance(assume, str) else assume)
    values, untouched = KnownValues(assumptions.policy), Untouched()
    answers = Answers(values, assumptions)
    followed = FollowedValues(values, answers, untouched)
    operators = RememberedOperators(mode, values, answers, untouched, roofline, results(on_gpu=device.kind == "cuda"))
    part, paged = part or Part(), HostTensors()
    simulated = _simulated(device, gpu, answers, assumptions, paged)
    with _one_at_a_time(), simulated, untouched, _explained(assumptions.policy.refuse):
        with mode, followed:
            built = _build(workload, mode, values, untouched)
        plan.check(built)  # outside the fake mode, so that a strategy can read the data
        with mode, followed, FakeCopies(values):  # a strategy may copy a module
            plan.carry_out(built)
        with followed:
            pieces = prepare_steps(built, steps, part.micro_batches)
        with mode, followed:
            pinned = PinnedBefore()
            with pinned if kernels else contextlib.nullcontext():
                running = started(built, "cpu", partial(map_tensors, partial(_on_device, values)))
        with mode:
            host = HostOperators(Link(operators, device))
            timeline = Timeline(WrittenViews(host), waits_after_step=True)
            recorder = Recorder(
                built.model,
                meta={**run_meta(built, plan, device.name, simulated=True), "seconds": None},
                on_gpu=device.kind == "cuda",
                execute=PlainAutograd(timeline) if device.kind == "cuda" else timeline,
                kernels=HostKernels(host, kernels) if kernels else None,
                calls_of=part.calls_of,
            )
            timeline.tracker = recorder.tracker
            gpu.memory.seen = recorder.tracker.seen
            paged.host = host
            with host_copies(recorder.tracker, host, pinned) if kernels else contextlib.nullcontext():
                run_steps(running, pieces, recorder, progress, live)
    trace = recorder.trace()
    trace = dataclasses.replace(trace, meta={**trace.meta, "assumptions": assumptions.rows()})
    if kernels is None:
        return trace
    cost = cost_table(recorder.work, roofline.assumed) if roofline.is_known else None
    meta = {**trace.meta, "cost": cost, "estimated_workspaces": sorted(kernels.estimated)}
    for note in (*gpu.notes, *(_HOST_WORKS for _ in range(cost is not None and host.works))):
        add_note(meta, note)
    return on_device(dataclasses.replace(trace, meta=meta), device, settings, gpu.memory.cache_emptied)


def _build(
    source: Workload | Callable[[], Workload], mode: FakeTensorMode, values: KnownValues, untouched: Untouched
) -> Workload:
    """The workload on fake tensors; a model of real ones is copied."""
    if isinstance(source, Workload):
        built = usable(source)
    else:
        with FakeCopies(values):
            built = build_workload(source)
    for buffer in built.model.buffers():
        parts_of(buffer)  # refuses a wrapper that cannot be taken apart, which the copy would make a plain tensor
    if all(isinstance(part, FakeTensor) for parameter in built.model.parameters() for part in parts_of(parameter)):
        return built
    untouched.keep_model(built.model)
    with FakeCopyMode(mode), FakeCopies(values):
        model = copy.deepcopy(built.model)
    for copied, buffer in zip(model.buffers(), built.model.buffers(), strict=True):
        values.know(copied, buffer)
    return dataclasses.replace(built, model=model, settings=dict(built.settings))


def _on_device(values: KnownValues, tensor: Any) -> Any:
    """A tensor of the same layout, made in the simulation; wrappers hold such tensors."""
    parts_of(tensor)
    if is_wrapper(tensor):
        names, context = tensor.__tensor_flatten__()
        held = {name: getattr(tensor, name) for name in names}
        inner = {
            name: _on_device(values, value) if isinstance(value, Tensor) else value for name, value in held.items()
        }
        return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
    moved = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    values.know(moved, tensor)
    return moved


_HOST_WORKS = "the estimated step time leaves out what the host's processor computes: its rates are not known"
_simulating = threading.Lock()
_nested = threading.local()


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Wait for simulations in other threads: each changes PyTorch for the whole process.

    Raises:
        UsageError: this thread is in a simulation already.
    """
    if getattr(_nested, "is_inside", False):
        raise UsageError(
            "simulate was called by a target that is being simulated: simulations cannot be nested; call it elsewhere"
        )
    with _simulating:
        _nested.is_inside = True
        try:
            yield
        finally:
            _nested.is_inside = False


@contextlib.contextmanager
def _simulated(
    device: Device, gpu: VisibleGpu, answers: Answers, assumptions: Assumptions, paged: HostTensors
) -> Iterator[None]:
    """Make all changes to PyTorch that a simulation needs, and undo them on exit."""
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(fake_tensors_use_foreach())
        scopes.enter_context(fake_tensors_train(answers))
        quantized = scopes.enter_context(BitsandbytesKernels(device, assumptions))
        if device.kind == "cuda":
            scopes.enter_context(cuda_semantics(device.capability))
            scopes.enter_context(gpu)
            packages = scopes.enter_context(VisiblePackages(device, gpu.notes.append))
            libraries = scopes.enter_context(ChangedLibraries(paged_state(paged)))
            hidden, given = (gpu.hidden, packages.hidden), packages.given

            def look() -> None:
                quantized.look()
                libraries.look()

            scopes.enter_context(imports_see_the_machine(*hidden, given=given, imported=look))
        else:
            scopes.enter_context(imports_see_the_machine(imported=quantized.look))
        yield


@contextlib.contextmanager
def _explained(refuses: bool) -> Iterator[None]:
    """Report what a simulation cannot do in terms of the target's code, not of PyTorch's internals."""
    try:
        yield
    except NotSimulated as error:
        raise TargetError(f"{error}{where(error)}") from error
    except TargetError as error:
        cause = error.__cause__
        if isinstance(cause, (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)):
            optimizer = _optimizer_in(cause)
            raise TargetError(
                f"{f'the optimizer {optimizer}' if optimizer else 'the target'} needs the value of a tensor, which a "
                f"simulation does not have: {cause.func}{where(cause)}. "
                + ("Use another optimizer" if optimizer else "Compute it without .item(), boolean masks or nonzero()")
                + (", allow assumptions" if refuses else "")
                + ", or record a real run: --device cpu"
            ) from cause
        if isinstance(cause, fake_tensor.UnsupportedOperatorException):
            raise TargetError(
                f"the operator {cause.func} cannot be simulated{where(cause)}: it has no fake implementation. "
                "Register one (torch.library.register_fake), or record a real run: --device cpu"
            ) from cause
        raise


def _optimizer_in(error: BaseException) -> str | None:
    """Name of the optimizer whose step raised an error; None: the error comes from elsewhere."""
    frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((type(owner).__name__ for owner in frames if isinstance(owner, torch.optim.Optimizer)), None)
