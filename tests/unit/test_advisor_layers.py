"""Advice for models with several lists of layers, and with layers that cannot be planned or computed again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memscope import Workload, simulate
from memscope.advisor.advise import advise
from memscope.errors import UsageError
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies.ckpt import LayerPlan
from tests.small_chain import ROWS, WIDTH, Half

DEVICE = get_device("a100-40gb")
MIB = 2**20


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = torch.relu(self.linear(x))
        return h


class Once(Layer):
    """Like a layer that counts its calls: it cannot run again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() >= 0:
            raise RuntimeError("computed again")
        return super().forward(x)


class Towers(nn.Module):
    """Two towers, the second of which is called first; a list that is called twice, and one that keeps little."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList([Layer(), Once(), Layer()])
        self.vision = nn.ModuleList(Layer() for _ in range(2))
        self.shared = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())])
        self.small = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 1))])

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for layer in self.vision:
            seen = layer(seen)
        for layer in self.text:
            x = layer(x)
        for head in (*self.shared, *self.shared, *self.small):
            x = head(x)
        return x.mean() + seen.square().mean()


def towers() -> Workload:
    return Workload(Towers(), [torch.ones(ROWS, WIDTH)], lambda m, x: m(x), torch.optim.AdamW, name="towers")


CHAIN = ["vision.0", "vision.1", "text.0", "text.1", "text.2"]


def test_towers_are_planned_in_call_order_and_what_cannot_be_is_a_note(tmp_path: Path) -> None:
    plain = simulate(towers, device=DEVICE, strategies="optim:fused")
    budget = int(plain.meta["peak_reserved"]) + DEVICE.context_bytes - 2 * MIB
    found = advise(towers, budget=budget, device=DEVICE, strategies="optim:fused,ga:steps=1")
    assert found.feasible
    assert list(found.layers) == CHAIN
    assert found.layers["text.1"] in ("none", "offload")
    assert {*found.layers.values()} - {"none", "offload"}  # others are computed again
    notes = "\n".join(found.notes)
    assert 'shared gets no options: "shared.0" is called 2 times' in notes
    assert "small gets no options: its layers keep 0.0% of the activations that all layers keep" in notes
    assert "not recomputed, because that fails: text.1 (" in notes
    assert "computed again" in notes
    assert "refused" not in notes  # every plan peaked as predicted
    file = LayerPlan(found.layers, found.made_for).save(tmp_path / "plan.json")
    small = dataclasses.replace(DEVICE, capacity_bytes=budget)
    trace = simulate(towers, device=small, strategies=f"optim:fused,ckpt:plan={file}")
    assert trace.meta["out_of_memory"] is None
    assert trace.peak.allocated_bytes == found.peak.allocated


def test_a_list_that_the_user_names_is_refused_where_it_cannot_be_planned() -> None:
    with pytest.raises(
        UsageError, match=r'the layers shared.0 to shared.0 form no chain: .* "shared.0" is called 2 times'
    ):
        advise(towers, budget="30GB", device=DEVICE, layer_list="shared", strategies="optim:fused,ga:steps=1")


@pytest.mark.parametrize("times", [0, 2])  # 0: not as modules, as in SqueezeBERT; 2: as in ALBERT
def test_layers_that_do_not_run_once_are_a_note_and_the_models_children_are_planned(times: int) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList([Half()]), Half()

        def forward(self, x: Tensor) -> Tensor:
            layer = self.layers[0]
            return self.head(layer(layer(x)) if times else layer.forward(x))

    def shared() -> Workload:
        model, batch = nn.ModuleDict({"encoder": Shared(), "top": Half()}), torch.ones(8 * ROWS, WIDTH)
        return Workload(
            model, [batch], lambda m, x: m["top"](m["encoder"](x)).square().mean(), torch.optim.AdamW, name="shared"
        )

    plain = simulate(shared, device=DEVICE, strategies="optim:fused")
    budget = int(plain.meta["peak_reserved"]) + DEVICE.context_bytes - 2 * MIB
    found = advise(shared, budget=budget, device=DEVICE, strategies="optim:fused,ga:steps=1")
    assert found.feasible
    assert found.layers.keys() == {"encoder", "top"}
    assert found.layers["encoder"] != "none"
    note = f"is called {times} times, so no list of layers can be planned: each of the model's direct children is one"
    assert any(note in one for one in found.notes)


def test_a_model_of_one_layer_gets_a_plan() -> None:
    def one() -> Workload:
        model, batch = nn.Sequential(Half()), torch.ones(8 * ROWS, WIDTH)
        return Workload(model, [batch], lambda m, x: m(x).square().mean(), torch.optim.AdamW, name="one")

    plain = simulate(one, device=DEVICE, strategies="optim:fused")
    budget = int(plain.meta["peak_reserved"]) + DEVICE.context_bytes - 2 * MIB
    found = advise(one, budget=budget, device=DEVICE, strategies="optim:fused,ga:steps=1")
    assert found.feasible
    assert found.layers.keys() == {"0"}
