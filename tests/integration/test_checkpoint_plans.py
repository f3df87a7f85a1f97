"""Checkpoint plans on whole models: what is simulated is what runs, and foreign models keep their gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from installed import Install
from torch import Tensor, nn

from memscope import Trace, record, simulate
from memscope.strategies import Plan
from memscope.strategies.ckpt import Checkpoint, LayerPlan
from memscope.strategies.ckpt.layers import named_layers
from memscope.testing import check_strategy
from memscope.workload.description import Workload
from memscope.workload.target import find_target

TARGET = find_target("llama2")
SMALL = TARGET.configure("debug", {"n_layers": "4", "dim": "48", "accumulation": "2", "seq_len": "48"})
OPTIONS = {
    "children": ["recompute:attention", "recompute:feed_forward", "recompute:attention+feed_forward", "none"],
    "save": ["save:attention/aten._softmax", "save:feed_forward.w1/aten.mm+feed_forward.w3/aten.mm", "full", "none"],
    "save adapted": ["save:attention.wq/aten.mm", "save:attention.wv/aten.mm+./aten.add", "full", "offload"],
    "offload": ["offload", "offload", "none", "full"],
    "segments": ["none", "full:3", "within:layers.1", "within:layers.1"],
}
BESIDE = [
    *((options, others) for options in OPTIONS for others in ("", "lora:targets=wq+wv,amp,ga:steps=2")),
    ("save adapted", "lora:targets=wq+wv"),
    ("offload", "amp:dtype=bf16"),  # casts of weights are saved
]


def births_before_death(trace: Trace) -> list[int]:
    """How many allocations were made before each one died."""
    return np.where(trace.freed < 0, -1, np.searchsorted(np.sort(trace.born), trace.freed)).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("options", "others"), BESIDE)
def test_simulated_and_really_run_it_is_the_same_list_of_allocations(options: str, others: str) -> None:
    def build() -> Workload:
        return TARGET.build(SMALL)

    def plan() -> Plan:
        layers = LayerPlan({f"layers.{index}": option for index, option in enumerate(OPTIONS[options])})
        return Plan.of(*Plan.parse(others).strategies, Checkpoint.of(layers))

    simulated, run = simulate(build, device="cpu", strategies=plan()), record(build, strategies=plan())
    for column in ("size", "requested", "category", "phase", "step", "micro_batch"):
        assert getattr(simulated, column).tolist() == getattr(run, column).tolist(), column
    names = [[trace.modules[code] for code in trace.module] for trace in (simulated, run)]
    assert names[0] == names[1]
    assert births_before_death(simulated) == births_before_death(run)
    assert simulated.meta["flops"] == run.meta["flops"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_byte_of_the_peak_of_a_simulated_gpu_has_an_owner(options: list[str]) -> None:
    layers = LayerPlan({f"layers.{index}": option for index, option in enumerate(options)})
    trace = simulate(lambda: TARGET.build(SMALL), device="gpu", strategies=Plan.of(Checkpoint.of(layers)))
    assert trace.by_category()["other"] <= 0.005 * trace.peak.allocated_bytes


TOY = {
    "children and segments": ["full:2", "within:blocks.0"],
    "save": ["save:up/aten.addmm+wv/aten.mm+./aten.add", "recompute:norm+up"],
    "offload": ["offload", "save:down/aten.addmm"],
}


@pytest.mark.parametrize("options", TOY.values(), ids=TOY)
def test_a_plan_file_keeps_the_promises_of_a_strategy(install: Install, options: list[str], tmp_path: Path) -> None:
    install(beside=("ckpt", "amp"))  # tests/integration/test_conformance.py tries all pairs
    layers = {f"blocks.{index}": option for index, option in enumerate(options)}
    check_strategy(f"ckpt:plan={LayerPlan(layers).save(tmp_path / 'plan.json')}")


def test_pointing_at_the_layers_keeps_the_promises_of_a_strategy(install: Install) -> None:
    install(beside=("ckpt", "amp"))
    check_strategy("ckpt:layer-list=blocks,layers=1")


# A model written elsewhere: layers that take keywords, tuples and None.

HUGGING_FACE = {
    "full": ["full"] * 4,
    "children": ["recompute:self_attn+mlp"] * 4,
    "save": ["save:mlp.gate_proj/aten.mm+self_attn.q_proj/aten.mm", "none", "save:./aten.add", "full"],
    "offload": ["offload"] * 4,
    "segments": ["full:2", "within:model.layers.0", "full:2", "within:model.layers.2"],
}


def hugging_face() -> Workload:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    return Workload(model, [torch.arange(24).view(2, 12)], lambda model, x: model(x, labels=x).loss, torch.optim.SGD)


def loss_and_gradients(workload: Workload) -> dict[str, Tensor]:
    torch.manual_seed(1)
    loss = workload.loss(workload.model, workload.batches[0])
    loss.backward()
    gradients = {name: p.grad for name, p in workload.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("options", HUGGING_FACE.values(), ids=HUGGING_FACE)
def test_a_model_of_transformers_keeps_its_loss_and_gradients_bit_for_bit(options: list[str]) -> None:
    workload = hugging_face()
    expected = loss_and_gradients(workload)
    workload = hugging_face()
    assert len(named_layers(workload.model)) == len(options)
    layers = {f"model.layers.{index}": option for index, option in enumerate(options)}
    Checkpoint.of(LayerPlan(layers)).apply(workload)
    found = loss_and_gradients(workload)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_layer_used_twice_under_autocast_keeps_its_results_apart() -> None:
    # Autocast casts its weights in the first use only, but perhaps again in the recomputations.
    class Float(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Sequential(nn.Linear(8, 8), Float(), nn.Linear(8, 8))
            self.layers = nn.ModuleList([layer, layer])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    found = []
    for option in ("none", "save:1/aten._to_copy+2/aten._to_copy+0/aten.addmm"):
        torch.manual_seed(0)
        model = Twice()
        Checkpoint.of(LayerPlan({"layers.0": option, "layers.1": option})).apply(
            Workload(model, [], lambda model, x: model(x), torch.optim.SGD)
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.linspace(-1, 1, 24).view(3, 8)).float().square().mean()
            loss.backward()  # inside autocast, where it still remembers the cast weights
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
