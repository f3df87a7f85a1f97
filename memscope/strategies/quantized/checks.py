"""Why a model's weights cannot be quantized, and what to say about it."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor

from memscope.strategies import Problem
from memscope.strategies.quantized.library import INSTALL, is_installed
from memscope.strategies.quantized.targets import quantizable, quantized_layers
from memscope.workload.description import Workload

__all__ = ["missing_library", "note_stand_in", "problems_of"]


def problems_of(workload: Workload) -> list[Problem]:
    """Report a model that is quantized already, or has no layer to quantize."""
    already = quantized_layers(workload.model)
    if already:
        what = f'"{already[0]}" of "{workload.name}" has a quantized weight already'
        return [Problem(what, "remove this strategy; lora adapts quantized weights as they are")]
    if not quantizable(workload.model):
        what = f'"{workload.name}" has no linear layer whose weight could be quantized'
        return [Problem(what, "remove this strategy")]
    return []


def missing_library(workload: Workload) -> list[Problem]:
    """Report a run of real tensors without bitsandbytes."""
    has_values = not any(isinstance(one, FakeTensor) or one.is_meta for one in workload.model.parameters())
    if not has_values or is_installed():
        return []
    what = "weights are quantized by bitsandbytes, which is not installed"
    return [Problem(what, f"{INSTALL}, or simulate the run, which needs no bitsandbytes")]


def note_stand_in(workload: Workload) -> None:
    """Note in the trace that layers stood in for bitsandbytes'."""
    if not is_installed():
        workload.notes = (
            *workload.notes,
            "bitsandbytes is not installed: its layers were simulated from their layout in 0.50.2, without the "
            "kernels that multiply with packed weights (some shapes of up to 1,536 rows)",
        )
