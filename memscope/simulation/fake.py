"""Simulate a workload: the same step on tensors without data, so that a 7B model needs neither a GPU nor the memory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import traceback
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from memscope.batch import map_tensors
from memscope.errors import TargetError, where
from memscope.hooks.recorder import Recorder
from memscope.hooks.steps import Choose, Progress, build_workload, prepare_steps, record_steps, run_meta
from memscope.live import Tell
from memscope.simulation.allocator import AllocatorSettings
from memscope.simulation.cost import cost_table
from memscope.simulation.cuda import cuda_semantics, fake_tensors_use_foreach
from memscope.simulation.device_memory import KernelWorkspaces, on_device
from memscope.simulation.devices import Device, get_device
from memscope.simulation.engine import PlainAutograd
from memscope.simulation.host import host_copies
from memscope.simulation.kernel_results import results
from memscope.simulation.refusal import NotSimulated
from memscope.simulation.remember import RememberedOperators
from memscope.simulation.roofline import Roofline
from memscope.simulation.stand_in import replaced
from memscope.simulation.visible_gpu import VisibleGpu
from memscope.strategies import Plan
from memscope.trace import Trace
from memscope.workload import Training, Workload

__all__ = ["simulate"]


def simulate(
    workload: Workload | Callable[[], Workload],
    *,
    device: str | Device = "gpu",
    strategies: str | Plan = "",
    steps: int = 2,
    allocator: AllocatorSettings | None = None,
    progress: Progress | None = None,
    live: Tell | None = None,
    micro_batches: Choose = list,
    calls_of: Collection[str] = (),
) -> Trace:
    """Trace `steps` training steps without computing anything.

    Args:
        workload: what to train, or a function that builds it. Built by a function, the model's weights take no memory;
            a workload given as such is copied, and stays as it is.
        device: a name that `memscope devices` lists: `gpu` (an NVIDIA GPU without a limit), a certain GPU, or `cpu`.
        strategies: a plan such as `lora:r=8,amp`, applied before the first step.
        steps: optimizer steps to trace; from the second on, the optimizer's state is there.
        allocator: settings of PyTorch's caching allocator; None: what `PYTORCH_CUDA_ALLOC_CONF` says.
        progress: called after each micro-batch, `progress(done, in all)`.
        live: called with a `memscope.live.LiveState` when a phase begins, and when all is done: bytes as they are asked
            for, which the trace rounds to the device's blocks.
        micro_batches: gives those of a step's micro-batches that are to be run; as it stands, all.
        calls_of: names of modules whose calls are noted in `meta["calls"]`.

    Returns:
        The trace. Its sizes are the blocks that PyTorch's allocator would give on the device, workspaces of kernels
        included; `meta["out_of_memory"]` says where the device would run out, if it would, and `meta["cost"]` how long
        it would take, as `memscope.simulation.cost` reads it: an estimate, None where the device's rates are not known.

    Raises:
        TargetError: when the target's code fails, or needs values that a simulation does not have.
        UsageError: when strategies, device or data cannot be used.

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
    settings = AllocatorSettings.from_environment(os.environ) if allocator is None else allocator
    kernels = KernelWorkspaces(device) if device.kind == "cuda" else None
    roofline = Roofline(device)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    gpu = VisibleGpu(device, settings)
    operators = RememberedOperators(mode, roofline, results(on_gpu=device.kind == "cuda"))
    with _simulated(device, gpu), _explained():
        with mode:
            built = _build(workload, mode)
        plan.check(built)  # on the host, where a strategy may look at the data
        with mode:
            plan.carry_out(built)
        pieces = prepare_steps(built, steps, micro_batches)
        with mode:
            training = Training.start(built, "cpu", partial(map_tensors, _on_device))
            recorder = Recorder(
                built.model,
                meta={**run_meta(built, plan, device.name, simulated=True), "seconds": None},
                on_gpu=device.kind == "cuda",
                execute=PlainAutograd(operators) if device.kind == "cuda" else operators,
                kernels=kernels,
                calls_of=calls_of,
            )
            gpu.seen = recorder.tracker.seen
            with host_copies(recorder.tracker) if kernels else contextlib.nullcontext():
                record_steps(built, pieces, training, recorder, progress, live)
    trace = recorder.trace()
    if kernels is None:
        return trace
    cost = cost_table(recorder.work, roofline.assumed) if roofline.is_known else None
    meta = {**trace.meta, "cost": cost, "estimated_workspaces": sorted(kernels.estimated)}
    return on_device(dataclasses.replace(trace, meta=meta), device, settings, gpu.cache_emptied)


def _build(workload: Workload | Callable[[], Workload], mode: FakeTensorMode) -> Workload:
    if not isinstance(workload, Workload):
        with _FakeCopies():
            return build_workload(workload)
    with FakeCopyMode(mode):
        return dataclasses.replace(workload, model=copy.deepcopy(workload.model), settings=dict(workload.settings))


def _on_device(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


@contextlib.contextmanager
def _simulated(device: Device, gpu: VisibleGpu) -> Iterator[None]:
    """Everything a simulation changes in PyTorch, put back on leaving."""
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(fake_tensors_use_foreach())
        scopes.enter_context(_gradients_are_finite())
        scopes.enter_context(_truncated_normals_are_within_bounds())
        scopes.enter_context(_modules_convert_fake_weights())
        if device.kind == "cuda":
            scopes.enter_context(cuda_semantics(device.capability))
            scopes.enter_context(gpu)
        yield


@contextlib.contextmanager
def _gradients_are_finite() -> Iterator[None]:
    """A gradient scaler steps only if no gradient overflowed; without values, a simulation takes it that none did."""
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
    """`nn.init.trunc_normal_` of 2.13 draws until no value is out of bounds; without values, it is done at once.

    Source: `_no_grad_trunc_normal_` in torch/nn/init.py, 2.13; 2.6 and 2.11 clamp instead.
    """
    draw: Callable[..., Tensor] = nn.init._no_grad_trunc_normal_

    def drawn(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else draw(tensor, *args, **kwargs)

    with replaced(nn.init, "_no_grad_trunc_normal_", drawn):
        yield


@contextlib.contextmanager
def _modules_convert_fake_weights() -> Iterator[None]:
    """`module.to(...)` puts new weights in place: PyTorch would swap tensors, which fake ones do not allow.

    Source: `Module._apply` in torch/nn/modules/module.py and `torch.utils.swap_tensors` (2.6 to 2.13).
    """
    convert: Callable[..., nn.Module] = nn.Module._apply
    replaced: dict[
        int, tuple[Tensor, Tensor]
    ] = {}  # by id of the old tensor, which is kept so that no other takes its id

    def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = [*module.parameters(recurse), *module.buffers(recurse)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return convert(module, fn, recurse)
        done: dict[int, Tensor] = {}
        for part in module.modules() if recurse else [module]:
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = _converted(tensor, fn, replaced, done)
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = convert  # type: ignore[method-assign]


def _converted(
    tensor: Tensor, fn: Callable[[Tensor], Tensor], replaced: dict[int, tuple[Tensor, Tensor]], done: dict[int, Tensor]
) -> Any:
    """The tensor after `fn`, once a call; one that another module shares is found by what it was replaced with."""
    while id(tensor) in replaced:
        tensor = replaced[id(tensor)][1]
    if id(tensor) not in done:
        with torch.no_grad():
            result = fn(tensor)
        if result is not tensor:
            if isinstance(tensor, nn.Parameter):
                result = nn.Parameter(result, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = (tensor, result)
        done[id(tensor)] = done[id(result)] = result
    return done[id(tensor)]


class _FakeCopies(TorchFunctionMode):
    """`copy.deepcopy` of a fake tensor: PyTorch's gives a tensor that does not share the storage of its own views."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            data = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            copied = nn.Parameter(data, requires_grad=False) if is_parameter else data
            memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what a simulation cannot do in the words of the target's code, not of PyTorch's internals."""
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
                + ("Take another optimizer" if optimizer else "Compute it without .item(), boolean masks or nonzero()")
                + ", or record a real run: --device cpu"
            ) from cause
        if isinstance(cause, fake_tensor.UnsupportedOperatorException):
            raise TargetError(
                f"the operator {cause.func} cannot be simulated{where(cause)}: it has no fake implementation. "
                "Register one (torch.library.register_fake), or record a real run: --device cpu"
            ) from cause
        raise


def _optimizer_in(error: BaseException) -> str | None:
    """Name of the optimizer in whose step an error was raised."""
    frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((type(owner).__name__ for owner in frames if isinstance(owner, torch.optim.Optimizer)), None)
