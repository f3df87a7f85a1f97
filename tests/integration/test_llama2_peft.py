"""LoRA on the LLaMA2 target against PEFT on transformers: same outputs, same gradients, adapters exchanged."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.lora import LoRALinear, merge, unmerge
from memscope.targets.llama2.adapters import load_adapter, save_adapter
from memscope.targets.llama2.hf_format import hf_module, rotary_order
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import build, read_preset
from memscope.targets.llama2.weights import load_weights

transformers = pytest.importorskip("transformers", reason="the reference, transformers, is not installed")
if find_spec("peft") is None:  # its import takes seconds, of each process that collects the tests
    pytest.skip("the reference, PEFT, is not installed", allow_module_level=True)

# At least the shipped tokenizer's 1,024 tokens, so that the target can be built with its data.
CONFIG = transformers.LlamaConfig(
    vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
TOKENS = torch.randint(0, 1024, (2, 20), generator=torch.Generator().manual_seed(1))
PLAN = "lora:r=4,alpha=12,dropout=0,targets=wq+wk+wv+w2"
THEIRS = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def ours(base: Path, plan: str = "") -> Llama:
    """Our model with its weights and, as after some training, updates that are not zero."""
    workload = build(dataclasses.replace(read_preset(base), weights=str(base), samples=8))
    torch.manual_seed(2)
    Plan.parse(plan).apply(workload)
    assert isinstance(workload.model, Llama)
    for layer in updates(workload.model).values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return workload.model


def updates(model: Llama) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def theirs(base: Path, **settings: Any) -> Any:
    """PEFT's model with the same weights and random updates."""
    import peft

    model = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**(THEIRS | settings))
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def opened(base: Path, adapter: Path) -> Any:
    import peft

    model = transformers.LlamaForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


@torch.no_grad()
def assert_close(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same_updates(mine: Llama, peer: Any) -> None:
    """Same logits, same loss, and the same gradient for every A and B."""
    mine.eval()
    assert_close(mine(TOKENS), peer(TOKENS).logits)
    losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        for logits in (mine(TOKENS), peer(TOKENS).logits)
    ]
    mine_found, peer_found = gradients(losses[0], mine), gradients(losses[1], peer)
    assert len(mine_found) == len(peer_found) == 2 * len(updates(mine))
    for name in updates(mine):
        key = f"base_model.model.{hf_module(name)}.lora_{{}}.default.weight"
        assert_close(mine_found[f"{name}.lora_a"], peer_found[key.format("A")])
        b = rotary_order(mine_found[f"{name}.lora_b"], name, mine.arch, to_hf=True)
        assert_close(b, peer_found[key.format("B")])


def test_peft_opens_our_adapter_and_computes_the_same(base: Path, tmp_path: Path) -> None:
    model = ours(base, PLAN)
    save_adapter(model, tmp_path / "adapter")
    assert_same_updates(model, opened(base, tmp_path / "adapter"))


def test_we_open_pefts_adapter_and_compute_the_same(base: Path, tmp_path: Path) -> None:
    peer = theirs(base)
    peer.save_pretrained(tmp_path / "adapter")
    model = ours(base)
    load_adapter(model, tmp_path / "adapter")
    assert len(updates(model)) == 2 * 4
    assert_same_updates(model, peer)


def test_pefts_adapter_loads_into_a_model_that_the_strategy_adapted(base: Path, tmp_path: Path) -> None:
    peer = theirs(base)
    peer.save_pretrained(tmp_path / "adapter")
    model = ours(base, PLAN.replace("dropout=0", "dropout=0.5"))
    load_adapter(model, tmp_path / "adapter")
    assert {layer.dropout.p for layer in updates(model).values()} == {0.5}
    assert_same_updates(model, peer)


def test_an_adapter_is_the_same_after_a_round_trip_through_peft(base: Path, tmp_path: Path) -> None:
    model = ours(base, PLAN)
    save_adapter(model, tmp_path / "ours")
    opened(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = ours(base)
    load_adapter(again, tmp_path / "theirs")
    for name, layer in updates(model).items():
        assert torch.equal(updates(again)[name].lora_a, layer.lora_a)
        assert torch.equal(updates(again)[name].lora_b, layer.lora_b)
        assert updates(again)[name].scaling == layer.scaling == 12 / 4


def test_peft_reads_rank_scale_and_dropout_from_our_settings(base: Path, tmp_path: Path) -> None:
    import peft

    save_adapter(ours(base, "lora:r=4,alpha=12,dropout=0.25"), tmp_path / "adapter")
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.peft_type, config.task_type) == ("LORA", "CAUSAL_LM")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 12, 0.25, "none")
    assert config.target_modules == {"q_proj", "v_proj"}


def test_peft_adapts_the_same_single_layer(base: Path, tmp_path: Path) -> None:
    model = ours(base, "lora:r=4,targets=layers.1.attention.wo+output")
    save_adapter(model, tmp_path / "adapter")
    assert_same_updates(model, opened(base, tmp_path / "adapter"))


def test_merged_equals_unmerged_and_pefts_merge(base: Path, tmp_path: Path) -> None:
    model = ours(base, PLAN).eval()
    save_adapter(model, tmp_path / "adapter")
    before = model(TOKENS)
    merge(model)
    assert_close(model(TOKENS), before)
    assert_close(model(TOKENS), opened(base, tmp_path / "adapter").merge_and_unload()(TOKENS).logits)
    unmerge(model)
    assert_close(model(TOKENS), before)


def test_without_its_adapter_the_model_differs(base: Path, tmp_path: Path) -> None:
    # Without this, the agreement above would prove nothing.
    plain = ours(base)
    adapted = ours(base, PLAN)
    load_weights(plain, base)
    assert (plain(TOKENS) - adapted.eval()(TOKENS)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, '"use_dora" is true'),
        ({"use_rslora": True}, '"use_rslora" is true'),
        ({"rank_pattern": {"q_proj": 2}}, '"rank_pattern" is {"q_proj": 2}'),
        ({"alpha_pattern": {"q_proj": 2}}, '"alpha_pattern" is {"q_proj": 2}'),
        ({"modules_to_save": ["lm_head"]}, '"modules_to_save" is ["lm_head"]'),
        ({"lora_bias": True}, '"lora_bias" is true'),
        ({"init_lora_weights": "pissa"}, '"init_lora_weights" is "pissa"'),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(
    base: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    theirs(base, **settings).save_pretrained(tmp_path / "adapter")
    model = ours(base)
    with pytest.raises(UsageError) as caught:
        load_adapter(model, tmp_path / "adapter")
    assert said in str(caught.value)
    assert not updates(model)
