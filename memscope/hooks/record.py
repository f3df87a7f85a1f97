"""Measure a workload: run its steps for real and record them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from memscope.errors import OutOfDeviceMemory, TargetError, UsageError
from memscope.hooks.device import require_gpu
from memscope.hooks.live_state import Tell
from memscope.hooks.out_of_memory import is_out_of_memory
from memscope.hooks.recorder import Recorder
from memscope.hooks.run import MicroBatchProgress, run_meta, run_steps
from memscope.strategies import Plan
from memscope.trace import Trace
from memscope.trace.notes import add_note
from memscope.units import format_bytes
from memscope.workload.batch import map_tensors
from memscope.workload.building import build_workload
from memscope.workload.description import Workload
from memscope.workload.inference import started
from memscope.workload.micro_batches import prepare_steps
from memscope.workload.step import Training

__all__ = ["record"]


def record(
    workload: Workload | Callable[[], Workload],
    *,
    device: str = "cpu",
    strategies: str | Plan = "",
    steps: int = 2,
    progress: MicroBatchProgress | None = None,
    live: Tell | None = None,
) -> Trace:
    """Run `steps` real steps and trace them. This trains the model: its weights change, except in inference.

    Args:
        workload: the workload, or a function that builds it; on the host, or already on the device.
        device: `cpu`, or `cuda` for PyTorch's current GPU, where every block of the allocator is recorded. If the GPU
            runs out of memory, the trace ends there, and `meta["out_of_memory"]` describes the failed request.
        strategies: a plan such as `lora:r=8,amp`, applied to the workload itself before the first step.
        steps: number of optimizer steps; from the second step on, the optimizer state exists.
        progress: called after each micro-batch as `progress(done, total)`.
        live: called with a `memscope.hooks.live_state.LiveState` when a phase begins, and at the end.

    Raises:
        TargetError: the target's code fails.
        UsageError: the strategies, the device or the data cannot be used.
        OutOfDeviceMemory: the model's weights alone do not fit on the GPU.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memscope import Workload, record
        >>> def build():
        ...     return Workload(
        ...         model=nn.Linear(1024, 1024, bias=False),
        ...         batches=[torch.randn(8, 1024)],
        ...         loss=lambda model, x: model(x).square().mean(),
        ...         optimizer_factory=torch.optim.AdamW,
        ...     )
        >>> trace = record(build, steps=1)
        >>> trace.by("category", at="peak")["gradient"]
        4194304
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(
            f'cannot record on "{device}": expected cpu or cuda. To predict a GPU without one, use memscope.simulate'
        )
    if device == "cuda":
        require_gpu()
    plan = Plan.parse(strategies) if isinstance(strategies, str) else strategies
    built = build_workload(workload)
    plan.apply(built)
    pieces = prepare_steps(built, steps)
    if device == "cuda":
        try:
            built.model.to(device)
        except torch.OutOfMemoryError as error:
            raise _no_room(built, error) from error
    running = started(built, device, partial(map_tensors, _MOVES[device]))
    recorder = Recorder(built.model, meta=run_meta(built, plan, device, simulated=False))
    scaler = running.scaler if isinstance(running, Training) else None
    scale = scaler.get_scale() if scaler else 0.0
    try:
        run_steps(running, pieces, recorder, progress, live)
    except TargetError as error:
        if not is_out_of_memory(error):
            raise
    trace = recorder.trace()
    skipped = _skipped_since(scaler, scale) if scaler else 0
    if not skipped:
        return trace
    meta = dict(trace.meta)
    add_note(
        meta,
        f"Gradients overflowed, and the gradient scaler skipped {skipped} of {len(trace.steps)} optimizer steps: "
        "optimizer state may be missing. Record more steps (--steps), or use amp:dtype=bf16",
    )
    return replace(trace, meta=meta)


def _skipped_since(scaler: torch.amp.GradScaler, scale: float) -> int:
    """Number of optimizer steps that the scaler has skipped since its scale was `scale`.

    Valid for runs too short for the scale to grow again. Source: `GradScaler.update` in torch/amp/grad_scaler.py (2.6
    to 2.13), where each skipped step multiplies the scale by the backoff factor.
    """
    now = scaler.get_scale()
    return round(math.log(now / scale) / math.log(scaler.get_backoff_factor())) if now < scale else 0


_MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "cpu": torch.clone,
    "cuda": lambda tensor: tensor.to("cuda", non_blocking=True),
}


def _no_room(workload: Workload, error: torch.OutOfMemoryError) -> OutOfDeviceMemory:
    """The error for weights that alone do not fit, so that no step can be traced."""
    size_bytes = sum(parameter.nbytes for parameter in workload.model.parameters())
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    what = ". ".join(str(error).split(". ")[:2])
    return OutOfDeviceMemory(
        f'"{workload.name}" does not fit: its weights need {format_bytes(size_bytes)}, and the GPU has '
        f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} free. "
        f"To simulate the memory that a step would need, use --device gpu ({what})"
    )
