"""Head and loss in parts: no tensor as large as all logits, and the same loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from memscope.errors import UsageError
from memscope.hooks.work import flops_of, has_formula
from memscope.program.applied_plan import AppliedPlan
from memscope.simulation.cuda.workspace_call import TensorMeta
from memscope.simulation.cuda.workspaces import workspaces_for
from memscope.simulation.devices.catalogue import get_device
from memscope.simulation.simulate import simulate
from memscope.strategies import Plan
from memscope.strategies.loss import Loss
from memscope.strategies.loss import loss as loss_module
from memscope.strategies.loss.parts import has_fused
from memscope.targets.llama2.config import Config
from memscope.targets.llama2.target import build
from memscope.testing import toy_workload
from memscope.workload.description import Workload

needs_fused = pytest.mark.skipif(not has_fused(), reason="linear_cross_entropy in parts came with PyTorch 2.13")
TOKENS, VOCABULARY, DIM = 8 * 11, 40, 16  # of the toy: 8 samples, padded to the longest


def largest(plan: str) -> int:
    """Bytes of the largest allocation of the toy's step in head, loss and their backward pass."""
    trace = simulate(toy_workload, device="cpu", strategies=plan)
    module = trace.modules.index("head")
    return int(trace.requested[trace.module == module].max())


def test_the_logits_are_never_whole() -> None:
    assert largest("") == TOKENS * VOCABULARY * 4
    assert largest("loss:chunks=4") == TOKENS // 4 * VOCABULARY * 4
    # 88 tokens in 5 parts: torch.chunk gives the first four 18 tokens.
    assert largest("loss:chunks=5") == 18 * VOCABULARY * 4


def test_more_parts_than_tokens_are_one_part_a_token() -> None:
    # The gradient of the head's weight, which no part makes smaller.
    assert largest("loss:chunks=1000") == VOCABULARY * DIM * 4


@pytest.mark.parametrize("plan", ["loss:chunks=3", pytest.param("loss:fused", marks=needs_fused)])
def test_llama2_has_the_same_loss_and_gradients(plan: str) -> None:
    small = Config(
        dim=24, n_layers=1, n_heads=2, vocab_size=1024, multiple_of=8, max_seq_len=512, samples=2, micro_batch=2,
        accumulation=1, dtype="fp64",
    )  # fmt: skip
    found = []
    for strategies in ("", plan):
        workload = build(small)
        Plan.parse(strategies).apply(workload)
        batch = workload.split(workload.batches[0], 1)[0]
        loss = workload.loss(workload.model, batch)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in workload.model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_model_whose_head_and_loss_are_unknown_is_one_clear_error() -> None:
    def unknown() -> Workload:
        return dataclasses.replace(toy_workload(), head_loss=None)

    message = r'loss: the head and the loss of "toy" cannot be found: give the Workload a head_loss, or .*use_liger'
    with pytest.raises(UsageError, match=message):
        simulate(unknown, device="cpu", strategies="loss")


def test_labels_of_another_shape_are_an_error() -> None:
    workload = toy_workload()
    known = workload.head_loss
    assert known is not None
    workload.head_loss = dataclasses.replace(known, inputs=lambda model, batch: (model(batch), batch[:, 1:]))
    Plan.parse("loss").apply(workload)
    with pytest.raises(UsageError, match=r"labels of shape \[2, 4\]: expected a label for each token"):
        workload.loss(workload.model, torch.ones(2, 5, dtype=torch.int64))


def test_a_program_with_another_loss_is_told_the_flag_of_its_framework() -> None:
    with AppliedPlan(Plan.parse("loss")) as applied:
        model = nn.Linear(4, 4)
        torch.optim.SGD(model.parameters())
        with pytest.raises(UsageError, match="there is use_liger_kernel=True of TrainingArguments"):
            applied.require_use(built=True)


def test_a_pytorch_without_the_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    (problem,) = Loss(Loss.Config(fused=True)).check(toy_workload())
    assert str(problem).endswith("which PyTorch 2.13 has: use loss:chunked")
    assert Loss.candidates(toy_workload()) == [Loss.Config()]


@needs_fused
def test_a_head_with_an_adapter_is_not_fused() -> None:
    workload = toy_workload()
    Plan.parse("lora:targets=head,loss:fused").apply(workload)
    with pytest.raises(UsageError, match="this LoRALinear computes its result otherwise: use loss:chunked"):
        workload.loss(workload.model, torch.ones(2, 5, dtype=torch.int64))


OP = "torch_nn._linear_cross_entropy_batch_chunked"


def scratch(dtype: str, policy: str, weight_is_trained: bool = True) -> dict[str, int]:
    """Workspaces for 4,096 tokens of width 1,024 and 32,000 classes, in parts of 512."""
    arguments: dict[str, Any] = {
        "input": TensorMeta((4096, 1024), dtype),
        "linear_weight": TensorMeta((32_000, 1024), dtype),
        "batch_chunk_size": 512,
        "acc_policy": policy,
        "acc_dtype": "float32",
        "compute_input_grad": True,
        "compute_linear_weight_grad": weight_is_trained,
    }
    found = workspaces_for(f"{OP}.default", arguments, get_device("a100-40gb"), (2, 13))
    return {workspace.name: workspace.size_bytes for workspace in found}


def test_the_scratch_of_the_fused_loss_is_that_of_its_source() -> None:
    assert scratch("float32", "compact") == {
        "logits of a part": 512 * 32_000 * 4,
        "rows of the weight": 512 * 1024 * 4,
    }
    # Logits in float32, and their gradient in bfloat16 for both products: twice, as a variable holds the last one.
    assert scratch("bfloat16", "compact") == {
        "logits of a part": 512 * 32_000 * 4,
        "input of a part": 512 * 1024 * 4,
        "rows of the weight": 512 * 1024 * 2,
        "gradient of the logits of a part": 512 * 32_000 * 2,
        "gradient of the logits of the part before": 512 * 32_000 * 2,
    }
    assert scratch("bfloat16", "balanced")["gradient of the weight from a part"] == 32_000 * 1024 * 4
    assert "input of a part" not in scratch("bfloat16", "compact", weight_is_trained=False)
    assert scratch("bfloat16", "accurate")["weight in the dtype of the logits"] == 32_000 * 1024 * 4


@needs_fused
def test_the_operations_of_the_fused_loss_are_counted() -> None:
    import torch.nn.modules.linear_cross_entropy  # defines the operator

    op = torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default
    rows, weight = torch.empty(6, 4), torch.empty(10, 4)
    options = ("sum", -100, 0.0, 3, "compact", torch.float32, False)
    product = 2 * 6 * 10 * 4
    assert has_formula(op)
    read = {"input", "linear_weight", "batch_chunk_size", "acc_policy", "acc_dtype", "compute_input_grad"}
    assert read <= {argument.name for argument in op._schema.arguments}
    for asked, products in (((True, True, False), 3), ((True, False, False), 2), ((False, False, False), 1)):
        arguments = (rows, weight, torch.empty(6), None, None, *options, *asked)
        assert flops_of(op, arguments, {}, ()) == products * product


def test_small_logits_are_left_out_of_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toy_workload()
    monkeypatch.setattr(loss_module, "_LEAST_SHARE", 1e-9)
    assert (Loss.candidates(toy), Loss.left_out(toy)) == ([Loss.Config(fused=has_fused())], [])
    monkeypatch.setattr(loss_module, "_LEAST_SHARE", 1e9)
    assert (Loss.candidates(toy), Loss.left_out(toy)) == ([], [Loss.Config(fused=has_fused())])
