"""Record a workload's steps as they really run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memscope.errors import MemscopeError, UsageError
from memscope.hooks.recorder import Recorder
from memscope.hooks.steps import Progress, prepare_steps, record_steps, run_meta, target_error
from memscope.strategies import Plan
from memscope.trace import Trace
from memscope.workload import Training, Workload

__all__ = ["record"]


def record(
    workload: Workload | Callable[[], Workload],
    *,
    device: str = "cpu",
    strategies: str | Plan = "",
    steps: int = 2,
    progress: Progress | None = None,
) -> Trace:
    """Run `steps` real training steps and trace them. The model is really trained: its weights change.

    Args:
        workload: what to train, or a function that builds it; its model is on the device already.
        device: `cpu`.
        strategies: a plan such as `lora:r=8,amp`, applied to the workload itself before the first step.
        steps: optimizer steps to run; from the second on, the optimizer's state is there.
        progress: called after each micro-batch, `progress(done, in all)`.

    Raises:
        TargetError: when the target's code fails.
        UsageError: when strategies, device or data cannot be used.
    """
    if device != "cpu":
        raise UsageError(
            f'cannot record on "{device}": expected cpu. To predict a GPU without one, use memscope.simulate'
        )
    plan = Plan.parse(strategies) if isinstance(strategies, str) else strategies
    try:
        built = workload if isinstance(workload, Workload) else workload()
    except MemscopeError:
        raise
    except Exception as error:
        raise target_error("the target", error) from error
    plan.apply(built)
    pieces = prepare_steps(built, steps)
    training = Training.start(built, device, lambda data: pytree.tree_map_only(Tensor, torch.clone, data))
    recorder = Recorder(built.model, meta=run_meta(built, plan, device, simulated=False))
    record_steps(built, pieces, training, recorder, progress)
    return recorder.trace()
