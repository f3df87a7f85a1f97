"""Samples in one row in place of padded rows: fewer tokens, the same loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memscope.errors import UsageError
from memscope.program.applied_plan import AppliedPlan
from memscope.simulation.simulate import simulate
from memscope.strategies import Plan
from memscope.strategies.pack import Pack
from memscope.targets.llama2.config import Config
from memscope.targets.llama2.target import build
from memscope.testing import toy_workload
from memscope.workload.description import Workload

SHAPE: dict[str, Any] = {"dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 1024, "multiple_of": 8, "dtype": "fp64"}
DIM = 16  # of the toy, whose 8 samples have 4 to 11 tokens


def test_activations_are_those_of_the_tokens_without_padding() -> None:
    sizes = {}
    for plan in ("", "pack"):
        trace = simulate(toy_workload, device="cpu", strategies=plan)
        embedded = (trace.module == trace.modules.index("embed")) & (trace.step == 1)
        sizes[plan] = max(trace.requested[embedded & (trace.op == trace.ops.index("aten.embedding.default"))])
    assert sizes == {"": 8 * 11 * DIM * 4, "pack": sum(range(4, 12)) * DIM * 4}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 40])
def test_llama2_has_the_same_loss_and_gradients_in_one_row(attention: str, window: int | None) -> None:
    small = Config(
        **SHAPE, samples=4, micro_batch=4, accumulation=1, attention=attention, sliding_window=window, max_seq_len=512
    )
    found = []
    for plan in ("", "pack"):
        workload = build(small)
        Plan.parse(plan).apply(workload)
        (batch,) = workload.split(workload.batches[0], 1)
        loss = workload.loss(workload.model, batch)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        found.append([loss.detach(), workload.weight(batch), *(p.grad for p in workload.model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def alone() -> Workload:
    return build(Config(**SHAPE, samples=2, micro_batch=1, accumulation=2, max_seq_len=512))


def equal() -> Workload:
    return build(Config(**SHAPE, samples=2, micro_batch=2, accumulation=1, seq_len=32, max_seq_len=512))


def test_a_batch_without_padding_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"pack: the batch has no padding: .*: remove this strategy, or put samples"):
        Plan.parse("pack").apply(equal())
    # One sample a micro-batch: only `ga` of the same plan could tell before the run.
    with pytest.raises(UsageError, match="pack: the batch has no padding: every micro-batch has one sample"):
        simulate(alone, device="cpu", strategies="pack")
    assert Pack.candidates(alone()) == Pack.candidates(equal()) == []
    simulate(alone, device="cpu", strategies="ga:steps=1,pack")


def test_a_workload_without_packed_batches_is_an_error() -> None:
    workload = toy_workload()
    workload.packed = None
    with pytest.raises(UsageError, match='pack: "toy" has no packed batches: remove this strategy, or give'):
        Plan.parse("pack").apply(workload)


def test_a_program_is_told_what_does_it() -> None:
    with AppliedPlan(Plan.parse("pack")), pytest.raises(UsageError, match='"pack" changes the training loop'):
        torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
