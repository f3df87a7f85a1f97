"""A plan in words, and in the settings of other tools."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memscope.advisor.advice import Advice
from memscope.advisor.emit import TOOLS, emit
from memscope.advisor.layer_words import in_words
from memscope.simulation.simulate import simulate
from memscope.targets.hf.config import HfConfig
from memscope.targets.hf.target import build, hf
from tests.small_advice import advice, plain_bytes
from tests.small_chain import LAYERS

pytestmark = pytest.mark.usefixtures("kept_workspaces")


def test_alike_neighbours_are_told_as_a_range() -> None:
    layers = {
        "l.0": "none",
        "l.1": "full",
        "l.2": "full",
        "l.3": "full:2",
        "l.4": "within:l.3",
        "l.5": "save:a.b/aten.mm",
    }
    assert in_words(layers) == "l.0 none, l.1-2 full, l.3-4 full 2, l.5 save b"
    assert in_words(dict.fromkeys(layers, "none")) == "nothing"
    two_lists = dict.fromkeys(["encoder.0", "encoder.1", "decoder.0", "decoder.1"], "full")
    assert in_words(two_lists) == "encoder.0-1 full, decoder.0-1 full"


@pytest.fixture
def lora_everywhere() -> Advice:
    found = advice(plain_bytes())
    assert found.trace is not None
    chosen = {"lora": {"targets": "wq+wv"}}  # as recorded by a run with lora:targets=auto
    return dataclasses.replace(
        found,
        trace=dataclasses.replace(found.trace, meta={**found.trace.meta, "chosen": chosen}),
        strategies=("lora:r=8", "amp:dtype=bf16", "optim:fused"),
        layers={f"layers.{i}": "full" for i in range(LAYERS)},
    )


@pytest.mark.parametrize(
    ("tool", "lines"),
    [
        ("hf", ["bf16=True,", 'optim="adamw_torch_fused",']),
        ("axolotl", ["adapter: lora", "lora_r: 8", "gradient_checkpointing: true"]),
        ("torchtune", ["enable_activation_checkpointing: True"]),
        ("peft", ['target_modules=["q_proj", "v_proj"],']),
    ],
)
def test_other_tools_are_told_what_they_have_words_for(tool: str, lines: list[str], lora_everywhere: Advice) -> None:
    assert set(lines) <= set(emit(lora_everywhere, tool))


@pytest.mark.parametrize(
    ("optimizer", "tool", "line"),
    [
        ("optim:adamw-8bit", "hf", 'optim="adamw_bnb_8bit",'),
        ("optim:paged-adamw-8bit", "axolotl", "optimizer: paged_adamw_8bit"),
        ("optim:adafactor", "hf", 'optim="adafactor",'),
        ("optim:paged-adamw-8bit", "torchtune", "optimizer: {_component_: bitsandbytes.optim.PagedAdamW8bit}"),
        ("optim:fused", "torchtune", "optimizer: {_component_: torch.optim.AdamW, fused: true}"),
        ("optim:muon", "hf", "# not expressible here: optim:muon: an optimizer that this tool has no name for"),
        ("optim:muon", "torchtune", "# not expressible here: optim:muon: an optimizer that this tool has no name for"),
        ("optim:foreach=false", "hf", 'optim="adamw_torch",'),
    ],
)  # fmt: skip
def test_other_tools_are_told_the_optimizer(optimizer: str, tool: str, line: str, lora_everywhere: Advice) -> None:
    assert line in list(emit(dataclasses.replace(lora_everywhere, strategies=(optimizer,)), tool))


@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools_are_told_what_they_cannot_say(tool: str, lora_everywhere: Advice) -> None:
    some = {**lora_everywhere.layers, "layers.0": "none"}
    lines = emit(dataclasses.replace(lora_everywhere, layers=some), tool)
    assert any(line.startswith("# not expressible: checkpointing of layers.0 none") for line in lines)


TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 96}
RECIPE = f"""
base_model: gpt2
overrides_of_model_config: {json.dumps(TINY)}
sequence_len: 32
micro_batch_size: 4
gradient_accumulation_steps: 1
sdp_attention: true
optimizer: adamw_torch
max_grad_norm: 0.5
bf16: {{bf16}}
"""


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_an_axolotl_recipe_reads_back_to_the_same_bytes(tmp_path: Path, bf16: str) -> None:
    pytest.importorskip("transformers")
    first, second = tmp_path / "first.yml", tmp_path / "second.yml"
    first.write_text(RECIPE.replace("{bf16}", bf16))
    layers = {f"transformer.h.{index}": "full" for index in range(TINY["n_layer"])}
    plan = ("ga:steps=2", "optim:adamw,fused")
    settings = build(HfConfig(model=str(first))).settings
    made = SimpleNamespace(strategies=plan, layers=layers, made_for={"settings": settings}, trace=None, file=None)
    lines = emit(made, "axolotl")  # type: ignore[arg-type]
    assert not [line for line in lines if line.startswith("# not")]
    second.write_text("\n".join(lines))
    traces = [
        simulate(hf(first), device="a100-40gb", strategies=",".join([*plan, "ckpt"])),
        simulate(hf(second), device="a100-40gb"),
    ]
    assert traces[0].peak.allocated_bytes == traces[1].peak.allocated_bytes
    assert traces[0].max_by_category(step=1) == traces[1].max_by_category(step=1)


@pytest.mark.parametrize(
    ("settings", "plan", "line"),
    [
        ({"dtype": "fp32", "autocast": "off"}, "loss", "# not expressible here: loss: the nearest is use_liger_kernel"),
        (
            {"dtype": "fp32", "autocast": "off"},
            "amp:dtype=bf16",
            "# not expressible: fp32 weights with autocast in bf16",
        ),
        ({"dtype": "fp32", "autocast": "off"}, "bf16", "bfloat16: true"),
        ({"dtype": "auto", "autocast": "off"}, "ga:steps=2", "# not expressible: weights in the dtype of the model"),
        (
            {"dtype": "bf16", "autocast": "bf16", "attention": "sdpa", "fp32_modules": ()},
            "ga:steps=2",
            "# not expressible: axolotl keeps norms, embedding and head in float32",
        ),
    ],
)
def test_what_axolotl_does_otherwise_is_told(settings: dict[str, Any], plan: str, line: str) -> None:
    program = {"model": "gpt2", "micro_batch": 4, "accumulation": 2, "packing": False, "optimizer": "sgd", **settings}
    made = SimpleNamespace(strategies=(plan,), layers={}, made_for={"settings": program}, trace=None, file=None)
    lines = emit(made, "axolotl")  # type: ignore[arg-type]
    assert any(one.startswith(line) for one in lines), lines


@pytest.mark.parametrize(
    ("tool", "lines"),
    [
        ("peft", ["use_dora=True, use_rslora=False,", 'init_lora_weights="pissa",']),
        ("axolotl", ["peft_use_dora: true", "peft_use_rslora: false", "peft_init_lora_weights: pissa"]),
        ("torchtune", ["  use_dora: True"]),
    ],
)
def test_variants_of_lora_are_told(tool: str, lines: list[str], lora_everywhere: Advice) -> None:
    found = dataclasses.replace(lora_everywhere, strategies=("lora:dora,r=8,pissa=true,bias=all",))
    said = emit(found, tool)
    assert set(lines) <= set(said)
    assert tool == "peft" or any(line.startswith("# not expressible") and "biases" in line for line in said)
