"""LoRA and checkpointing on models of transformers: against PEFT, and against the step without checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memscope import Plan, Workload, simulate
from memscope.errors import UsageError
from memscope.strategies.ckpt.layers import repeated_layers
from memscope.strategies.lora.targets import PEFT_TARGETS

transformers = pytest.importorskip("transformers", reason="the models, of transformers, are not installed")

SIZES: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = SIZES | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = torch.arange(3, 19).reshape(2, 8)

MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **SIZES)),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**PLAIN)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**PLAIN)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, **SIZES)
    ),
}


def workload(name: str, *, peft: bool = False) -> Workload:
    torch.manual_seed(0)
    model = MODELS[name]()
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.05))
    batch = {"input_ids": TOKENS, "labels": TOKENS.flip(0)}
    return Workload(model, [batch], lambda model, batch: model(**batch).loss, torch.optim.AdamW, name=name)


def test_the_default_targets_are_pefts() -> None:
    constants = pytest.importorskip("peft.utils.constants", reason="the reference, PEFT, is not installed")
    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {kind: tuple(names) for kind, names in theirs.items() if isinstance(names, list)} == PEFT_TARGETS


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_lora_on_conv1d_and_on_a_subclass_of_linear_allocates_what_pefts_does(name: str) -> None:
    pytest.importorskip("peft", reason="the reference, PEFT, is not installed")
    ours, theirs = simulate(workload(name), strategies="lora:r=4"), simulate(workload(name, peft=True))
    assert ours.meta["parameters"] == theirs.meta["parameters"]
    assert Counter(ours.requested.tolist()) == Counter(theirs.requested.tolist())
    assert ours.peak.allocated_bytes == theirs.peak.allocated_bytes


@pytest.mark.parametrize(("name", "chosen"), [("t5", "q+v"), ("bert", "query+value")])
def test_lora_adapts_what_peft_adapts(name: str, chosen: str) -> None:
    pytest.importorskip("peft", reason="the reference, PEFT, is not installed")
    ours, theirs = workload(name), workload(name, peft=True)
    plan = Plan.parse("lora:r=4")
    plan.apply(ours)
    assert plan.strategies[0].chosen == {"targets": chosen}
    assert ours.parameter_counts() == theirs.parameter_counts()


def step(name: str, plan: str) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The loss and gradients of one step, with dropout."""
    found = workload(name)
    Plan.parse(plan).apply(found)
    found.model.train()
    torch.manual_seed(1)
    loss = found.loss(found.model, found.batches[0])
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in found.model.named_parameters()}


LAYERS = {
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "falcon": ["transformer.h.0", "transformer.h.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
}


@pytest.mark.parametrize("plan", ["ckpt", "ckpt:layers=1"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_model_with_a_cache_by_default_computes_the_same_with_checkpoints(name: str, plan: str) -> None:
    assert list(repeated_layers(MODELS[name]())) == LAYERS[name]
    (loss, gradients), (same_loss, same_gradients) = step(name, ""), step(name, plan)
    assert torch.equal(loss, same_loss)
    assert gradients.keys() == same_gradients.keys()
    for key, gradient in gradients.items():
        again = same_gradients[key]
        assert gradient is again or (gradient is not None and again is not None and torch.equal(gradient, again)), key


def test_a_cache_that_is_filled_before_the_layer_runs_is_refused() -> None:
    found = workload("gpt2")
    cache = transformers.DynamicCache(config=found.model.config)
    found.model(TOKENS, past_key_values=cache)
    Plan.parse("ckpt").apply(found)
    with pytest.raises(UsageError, match="a GPT2Block is checkpointed, but its KV cache holds keys and values"):
        found.model(TOKENS, past_key_values=cache)
