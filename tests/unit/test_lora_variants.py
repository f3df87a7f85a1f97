"""Variants of LoRA: DoRA, rsLoRA, PiSSA, OLoRA, and biases that are trained beside the updates."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope import record, simulate
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.lora import LoRALinear, adapt, adapted_layers, merge, unmerge
from memscope.strategies.lora.start import Start
from memscope.testing import toy_workload
from memscope.trace import PHASES, Trace
from memscope.workload.description import Workload


def toy(plan: str = "") -> Workload:
    torch.manual_seed(0)
    workload = toy_workload()
    Plan.parse(plan).apply(workload)
    return workload


def adapted(
    base: nn.Linear, *, r: int, alpha: float = 4.0, dora: bool = False, start: Start = "gaussian"
) -> LoRALinear:
    model = nn.ModuleDict({"layer": base})
    adapt(model, ["layer"], r=r, alpha=alpha, dropout=0.0, dora=dora, start=start)
    assert isinstance(model["layer"], LoRALinear)
    return model["layer"]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def refused(plan: str, workload: Workload | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        Plan.parse(plan).apply(workload or toy_workload())
    return str(caught.value)


def test_dora_scales_each_row_of_the_updated_weight_to_its_magnitude() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, dtype=torch.float64)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    layer = adapted(base, r=3, alpha=12.0, dora=True)
    assert layer.magnitude is not None
    torch.testing.assert_close(layer.magnitude, weight.norm(dim=1))  # at first, so that the output is unchanged
    nn.init.normal_(layer.lora_b)
    nn.init.uniform_(layer.magnitude, 1, 2)
    updated = weight + (12 / 3) * layer.lora_b @ layer.lora_a
    rows = layer.magnitude[:, None] * updated / updated.norm(dim=1, keepdim=True)
    x = inputs(7, 6)
    by_hand = F.linear(x, rows, bias)
    torch.testing.assert_close(layer(x), by_hand)
    merge(layer)
    torch.testing.assert_close(layer(x), by_hand)
    unmerge(layer)
    torch.testing.assert_close(layer.weight, weight)


def test_dora_trains_one_number_a_row_more() -> None:
    # wq in two layers, [16, 16]: A and B of rank 2 and 16 magnitudes each
    assert toy("lora:dora,r=2,targets=wq").parameter_counts()[1] == 2 * (2 * (16 + 16) + 16)


def sizes(trace: Trace) -> Counter[tuple[str, int]]:
    """How many allocations of each size there are in each phase."""
    return Counter(zip((PHASES[phase] for phase in trace.phase), trace.requested.tolist(), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_makes_the_allocations_of_pefts_layer(dropout: float) -> None:
    peft = pytest.importorskip("peft")

    def of_peft() -> Workload:
        workload = toy_workload()
        config = peft.LoraConfig(r=2, target_modules=["wq", "up"], lora_dropout=dropout, use_dora=True)
        workload.model = peft.get_peft_model(workload.model, config)
        return workload

    ours = record(toy_workload, strategies=f"lora:dora,r=2,dropout={dropout},targets=wq+up")
    assert sizes(ours) == sizes(record(of_peft))


def test_rslora_divides_alpha_by_the_root_of_the_rank() -> None:
    assert {layer.scaling for layer in adapted_layers(toy("lora:rslora,r=4,alpha=6").model).values()} == {6 / 2}


def test_pissa_starts_from_the_largest_singular_values_and_takes_them_out_of_the_weight() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=False)
    weight = base.weight.detach().clone()
    layer = adapted(base, r=2, start="pissa")
    best = torch.linalg.svd(weight)
    by_hand = best.U[:, :2] @ best.S[:2].diag() @ best.Vh[:2]  # the best approximation of rank 2 (Eckart and Young)
    torch.testing.assert_close(layer.scaling * layer.lora_b @ layer.lora_a, by_hand)
    torch.testing.assert_close(layer.weight, weight - by_hand)
    torch.testing.assert_close(layer.lora_b.norm(dim=0), (best.S[:2] / layer.scaling).sqrt())  # B and A share them


def test_olora_starts_from_the_qr_decomposition() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    weight = base.weight.detach().clone()
    layer = adapted(base, r=2, alpha=4.0, start="olora")
    torch.testing.assert_close(layer.lora_b.T @ layer.lora_b, torch.eye(2))
    torch.testing.assert_close(layer.lora_a, layer.lora_b.T @ weight)  # the first rows of R = QᵀW
    torch.testing.assert_close(layer.weight + 2 * layer.lora_b @ layer.lora_a, weight)


def test_a_decomposition_before_the_first_step_is_noted_with_its_bytes() -> None:
    # [32, 16] is the largest weight, in float32: U [32, 16], V [16, 16], B·A and the new weight [32, 16] each
    most = 4 * (2 * 32 * 16 + 32 * 16 + 16 * 16)
    assert most == 7168
    (note,) = simulate(toy_workload(), strategies="lora:pissa,r=2,targets=wq+up").meta["notes"]
    assert note.startswith(
        "lora: pissa decomposes each adapted weight before the first step, which the figures leave out"
    )
    assert "up to 7.00 KiB beside the model, and the workspace of cuSOLVER" in note


@pytest.mark.parametrize(
    ("plan", "biases"),
    [
        ("lora:r=2,bias=lora_only,targets=wq+up", {f"blocks.{i}.up.bias" for i in (0, 1)}),
        ("lora:r=2,bias=all", {f"blocks.{i}.{name}.bias" for i in (0, 1) for name in ("norm", "up", "down")}),
    ],
)
def test_biases_are_trained_beside_the_updates(plan: str, biases: set[str]) -> None:
    trained = {name for name, parameter in toy(plan).model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == biases


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("lora:bias=lora_only", "bias=lora_only, but the adapted layers have no bias: choose bias=none"),
        (
            "lora:pissa,r=17",
            "r=17 is more than the 16 rows or columns of the smallest adapted weight: choose at most 16, or leave "
            "pissa out",
        ),
        ("lora:pissa,olora=true", "pissa and olora are two initializations: leave one out"),
        ("lora:bias=some", 'setting "bias" cannot be "some": did you mean "none"? Valid: all, lora_only, none'),
    ],
)
def test_variants_that_cannot_be_used_are_refused(plan: str, said: str) -> None:
    assert said in refused(plan)


def test_a_model_without_biases_is_refused() -> None:
    workload = Workload(nn.Sequential(nn.Linear(2, 2, bias=False)), [], lambda m, x: x.sum(), torch.optim.AdamW)
    assert 'bias=all, but "workload" has no bias: choose bias=none' in refused("lora:r=1,bias=all", workload)
