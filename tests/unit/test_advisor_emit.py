"""A plan in words, and in the settings of other tools."""

from __future__ import annotations

import dataclasses

import pytest

from memscope.advisor.advice import Advice
from memscope.advisor.emit import TOOLS, emit
from memscope.advisor.layer_words import in_words
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
        strategies=("lora:r=8", "amp:dtype=bf16", "adamw:fused"),
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


@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools_are_told_what_they_cannot_say(tool: str, lora_everywhere: Advice) -> None:
    some = {**lora_everywhere.layers, "layers.0": "none"}
    lines = emit(dataclasses.replace(lora_everywhere, layers=some), tool)
    assert any(line.startswith("# not expressible: checkpointing of layers.0 none") for line in lines)


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
