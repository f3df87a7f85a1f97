"""Perplexity of held-out samples."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence

import torch

from memscope.errors import MemscopeError
from memscope.targets.llama2 import alpaca
from memscope.targets.llama2.alpaca import Sample
from memscope.workload.step import Training

__all__ = ["perplexity"]


@torch.no_grad()
def perplexity(training: Training, samples: Sequence[Sample]) -> float:
    """`exp` of the mean cross-entropy over all target tokens of the samples, in the precision of the training.

    Dropout is off; random state does not change.

    Raises:
        MemscopeError: the loss is not finite, or too large for its `exp`.
    """
    workload = training.workload
    dtype = workload.plan.autocast
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    workload.model.eval()
    try:
        for batch in (alpaca.collate([sample]) for sample in samples):
            tokens = workload.weight(batch)
            with torch.autocast(training.device_type, dtype=dtype) if dtype else contextlib.nullcontext():
                loss = workload.loss(workload.model, training.to_device(batch))
                assert isinstance(loss, torch.Tensor), "this target's loss keeps nothing"
            total = total.to(loss.device) + loss.double() * tokens
            weight += tokens
    finally:
        workload.model.train()
    mean = total.item() / weight
    if not mean < math.log(sys.float_info.max):
        raise MemscopeError(
            f"the loss of the {len(samples)} held-out samples is {mean}: broken weights, or numbers out of range; "
            "with amp, try dtype=bf16, which has the range of float32; --held-out 0 skips the evaluation"
        )
    return math.exp(mean)
