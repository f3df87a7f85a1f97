"""The training of a cell of `make gpu`: its workload, its weights on a device, and the start of training."""

from __future__ import annotations

from functools import partial
from typing import Any

from gpu_plan import STEP, TrainingCell


def prepare(cell: TrainingCell, preset: str) -> Any:
    """Return the cell's workload, before its strategies; its only data are the lengths in `STEP`."""
    from memscope.targets.llama2.alpaca import Sample
    from memscope.workload.target import find_target

    target = find_target("llama2")
    workload = target.build(target.configure(preset, {"dtype": cell.weights, "attention": cell.attention}))
    workload.batches = [[Sample(tuple(range(1, 1 + tokens)), prompt) for tokens, prompt in STEP]]
    return workload


def materialized(cell: TrainingCell, preset: str, device: str, strategies: str) -> Any:
    """Return the cell's workload on a device: one allocation per weight, in the order of the model, and no others."""
    import torch

    from memscope.strategies import Plan

    with torch.device("meta"):
        workload = prepare(cell, preset)
        Plan.parse(strategies).apply(workload)
    on_device(workload, device)
    return workload


def on_device(workload: Any, device: str) -> None:
    """Give a workload on the meta device random weights, created directly on `device`."""
    import torch

    from memscope.targets.llama2.model import rotations

    model = workload.model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        model.freqs_cis.copy_(rotations(model.arch))


def start(workload: Any, device: str, steps: int) -> tuple[Any, list[Any]]:
    """Start the training; return it, and the micro-batches of each step."""
    import torch
    from torch.utils import _pytree as pytree

    from memscope.workload.micro_batches import prepare_steps
    from memscope.workload.step import Training

    pieces = prepare_steps(workload, steps)
    move = partial(pytree.tree_map_only, torch.Tensor, lambda tensor: tensor.to(device))
    training = Training.start(workload, device, move)
    if training.scaler:  # at the default scale, the first gradients may overflow, and the optimizer would not step
        training.scaler = torch.amp.GradScaler(device, init_scale=1.0)
    return training, pieces
