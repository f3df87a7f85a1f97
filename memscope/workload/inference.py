"""One step of inference: the model runs without gradients, and nothing is updated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from memscope.workload.description import Workload
from memscope.workload.micro_batches import MicroBatch
from memscope.workload.running import Running, StepObserver
from memscope.workload.step import Training

__all__ = ["Inference", "run_inference", "started"]


@dataclass(kw_only=True)
class Inference(Running):
    """A started `Workload` without an optimizer."""

    @classmethod
    def start(cls, workload: Workload, device_type: str, to_device: Callable[[Any], Any]) -> Inference:
        """Turn dropout off. Called once, after every strategy has been applied."""
        workload.model.eval()
        return cls(workload=workload, device_type=device_type, to_device=to_device)


def started(workload: Workload, device_type: str, to_device: Callable[[Any], Any]) -> Training | Inference:
    """Start a workload: for inference if it has no optimizer, else for training.

    Raises:
        UsageError: the workload cannot be trained; see `Training.start`.
        TargetError: `optimizer_factory` fails.
    """
    kind = Inference if workload.optimizer_factory is None else Training
    return kind.start(workload, device_type, to_device)


@torch.inference_mode()
def run_inference(inference: Inference, pieces: list[MicroBatch], observer: StepObserver | None = None) -> None:
    """Run the model on the micro-batches in `pieces`, one after the other. Empties `pieces`.

    What the workload's `loss` returns is let go of, but for what comes second in a pair (`Workload.loss`).
    """
    index = 0
    while pieces:
        piece = pieces.pop(0)
        if observer:
            observer.phase("inference", index)
        with contextlib.ExitStack() as scopes:
            for scope in inference.workload.plan.contexts:
                scopes.enter_context(scope())
            inference.call(piece.data, observer)
        del piece
        index += 1
