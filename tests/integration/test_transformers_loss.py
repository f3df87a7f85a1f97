"""The strategy `loss` inside causal language models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memscope.errors import UsageError
from memscope.program.applied_plan import AppliedPlan
from memscope.simulation.simulate import simulate
from memscope.strategies import Plan
from memscope.strategies.loss.parts import has_fused
from memscope.targets.hf.target import hf

transformers = pytest.importorskip("transformers")
SHAPE = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 96}
IDS = torch.arange(2 * 9).reshape(2, 9) * 5 % 96


def llama(kind: str = "Llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, num_key_value_heads=2, head_dim=8, **settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def applied(model: Any, plan: str) -> Any:
    """The model of a program, changed when the program builds its optimizer."""
    with AppliedPlan(Plan.parse(plan)) as found:
        torch.optim.SGD(model.parameters())
        found.require_use(built=True)
    return model


@pytest.mark.parametrize(
    "plan",
    [
        "loss:chunks=3",
        pytest.param("loss:fused", marks=pytest.mark.skipif(not has_fused(), reason="came with PyTorch 2.13")),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"num_items_in_batch": torch.tensor(11)}, {"shift_labels": IDS}])
def test_loss_and_gradients_are_those_of_whole_logits(plan: str, asked: Any) -> None:
    labels = IDS.clone()
    labels[0, :4] = -100
    found = []
    for model in (llama(), applied(llama(), plan)):
        loss = model(input_ids=IDS, labels=labels, **asked).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_evaluation_and_generation_have_their_logits() -> None:
    plain, model = llama(), applied(llama(), "loss")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    for one in (plain, model):
        one.eval()
    found = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(found.loss, plain(input_ids=IDS, labels=IDS).loss)
    assert found.logits.shape == (2, 9, 96)


def test_a_loss_computed_from_the_logits_elsewhere_is_refused() -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM was called without labels in training"):
        applied(llama(), "loss")(IDS)


def test_a_model_that_caps_its_logits_is_refused() -> None:
    with pytest.raises(UsageError, match="Gemma2ForCausalLM changes its logits between head and loss"):
        applied(llama("Gemma2"), "loss")(input_ids=IDS, labels=IDS)


def test_the_logits_are_never_whole_beside_other_strategies() -> None:
    overrides = ",".join(f"{key}={value}" for key, value in SHAPE.items()) + ",num_key_value_heads=2"
    model = hf("llama-2-7b", overrides=overrides, seq_len=32, micro_batch=4, dtype="fp32")
    sizes = {}
    for plan in ("ckpt,lora", "ckpt,loss,lora"):
        trace = simulate(model, device="cpu", strategies=plan)
        in_head = [index for index, name in enumerate(trace.modules) if name.endswith("lm_head")]
        sizes[plan] = max(int(trace.requested[trace.module == index].max()) for index in in_head)
    assert sizes == {"ckpt,lora": 4 * 32 * 96 * 4, "ckpt,loss,lora": 4 * 32 // 8 * 96 * 4}
