"""BitFit, freezing and NEFTune: what is trained, what is kept for it, and noise on the embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from memscope import simulate
from memscope.errors import UsageError
from memscope.program.applied_plan import AppliedPlan
from memscope.strategies import Plan
from memscope.strategies.bitfit import BitFit
from memscope.strategies.freeze import Freeze
from memscope.testing import toy_workload
from memscope.trace import PHASES, Trace
from memscope.workload.description import Workload


def toy(plan: str) -> Workload:
    torch.manual_seed(0)
    workload = toy_workload()
    Plan.parse(plan).apply(workload)
    return workload


def trained(plan: str) -> set[str]:
    return {name for name, parameter in toy(plan).model.named_parameters() if parameter.requires_grad}


def refused(plan: str, model: nn.Module | None = None) -> str:
    workload = toy_workload() if model is None else Workload(model, [], lambda m, x: x, torch.optim.AdamW)
    with pytest.raises(UsageError) as caught:
        Plan.parse(plan).apply(workload)
    return str(caught.value)


def simulated(plan: str) -> Trace:
    return simulate(toy_workload, device="cpu", strategies=plan)


FORWARD, BACKWARD = PHASES.index("forward"), PHASES.index("backward")
BIASES = {f"blocks.{i}.{name}.bias" for i in (0, 1) for name in ("norm", "up", "down")}


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        ("bitfit", BIASES),
        ("bitfit:head", BIASES | {"head.weight"}),
        ("bitfit:bias=up+blocks.0.norm", {"blocks.0.up.bias", "blocks.1.up.bias", "blocks.0.norm.bias"}),
    ],
)
def test_bitfit_trains_biases_alone(plan: str, names: set[str]) -> None:
    assert trained(plan) == names


def test_bitfit_needs_no_input_of_a_linear_layer() -> None:
    # The gradient of a bias is a sum over tokens of the gradient of the output: no input is kept for a weight's.
    kept = {plan: simulated(plan).by("category", at="peak")["activation"] for plan in ("", "bitfit")}
    state = simulated("bitfit").by("category", at="peak").get("optimizer_state", 0)
    assert kept["bitfit"] < kept[""]
    assert state <= 2 * 4 * 2 * (16 + 32 + 16) + 4 * 6  # two moments and a step counter of each bias, float32


def test_frozen_layers_and_embeddings_are_not_trained() -> None:
    assert trained("freeze") == {name for name, _ in toy_workload().model.named_parameters()} - {"embed.weight"}
    assert {name.split(".")[0] + name.split(".")[1] for name in trained("freeze:layers=0")} == {"blocks1", "headweight"}
    assert "embed.weight" in trained("freeze:layers=0,embeddings=false")


def test_activations_below_the_lowest_trained_weight_are_not_kept() -> None:
    longest, dim = 11, 16  # tokens of the longest of the toy's 8 samples
    inputs_of_gelu = 8 * longest * 2 * dim * 4  # [8, 11, 32] in float32, kept by each block for its backward pass

    def kept(plan: str, block: int) -> bool:
        """Whether a block's input of GELU lives until the backward pass of the first step."""
        trace = simulated(plan)
        backward = next(at for at, phase in zip(trace.mark_event, trace.mark_phase, strict=True) if phase == BACKWARD)
        rows = zip(trace.requested, trace.module, trace.born, trace.freed, strict=True)
        of_block = [
            (born, freed)
            for size, module, born, freed in rows
            if size == inputs_of_gelu and trace.modules[module] == f"blocks.{block}.up" and born < backward
        ]
        assert of_block
        return any(freed > backward or freed < 0 for _, freed in of_block)

    assert kept("freeze:layers=0,embeddings=false", 0)  # the embeddings' gradient passes through the frozen layer
    assert not kept("freeze:layers=0", 0)
    assert kept("freeze:layers=0", 1)


def test_a_head_that_shares_the_frozen_embedding_is_named_in_a_note() -> None:
    workload = toy_workload()
    workload.model.head.weight = workload.model.embed.weight
    Plan.parse("freeze").apply(workload)
    assert workload.notes == ("freeze: head shares its weight with the frozen embeddings, and is not trained either",)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("bitfit:bias=wq", 'bitfit: bias=wq matches no module of "toy" with a bias: Valid: down, norm, up'),
        ("bitfit:bias=all+up", "bias=all stands alone"),
        ("freeze:layers=0-2", 'freeze: layers=0-2: "0-2" is outside the model: it has layers 0 to 1'),
        ("freeze:layers=first", 'freeze: layers=first: "first" chooses no layers: expected all, every-2, 0-15'),
        ("freeze:embeddings=false", "nothing is frozen: choose layers, such as layers=0-15, or embeddings"),
        ("neftune:alpha=0", "neftune: alpha=0.0 is no noise: choose a number above 0, such as 5"),
        ("neftune:embedding=emb", 'neftune: "toy" has no embedding "emb": did you mean "embed"?'),
    ],
)
def test_settings_that_cannot_be_used_are_refused(plan: str, said: str) -> None:
    assert said in refused(plan)


def test_models_without_the_parts_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    assert 'bitfit: "workload" has no bias to train: use lora or peft:ln_tuning' in refused("bitfit", plain)
    assert 'freeze: "workload" has no embeddings: choose embeddings=false and layers' in refused("freeze", plain)
    assert "freeze: every trained parameter would be frozen" in refused("freeze:layers=all,embeddings=false", plain)
    assert 'neftune: "workload" has no embedding (nn.Embedding)' in refused("neftune", plain)
    one = nn.ModuleDict({"words": nn.Embedding(3, 2), "places": nn.Embedding(3, 2)})
    assert (
        'neftune: "workload" has several embeddings: name that of the tokens: embedding=words. Valid: words, places'
        in refused("neftune", one)
    )
    assert "freeze: every trained parameter would be frozen: freeze fewer layers" in refused("freeze", one)


def test_candidates_freeze_from_the_bottom() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(8)))
    workload = Workload(layers, [], lambda m, x: x, torch.optim.AdamW)
    assert [config.layers for config in Freeze.candidates(workload)] == ["0-3", "0-1", "0-5"]
    assert BitFit.candidates(workload) == [BitFit.Config()]


def noisy(model: nn.Module, alpha: float) -> nn.Module:
    workload = Workload(model, [], lambda m, x: x, torch.optim.AdamW)
    Plan.parse(f"neftune:alpha={alpha}").apply(workload)
    return workload.model


def test_neftune_adds_uniform_noise_in_training_alone() -> None:
    torch.manual_seed(0)
    tokens = torch.zeros(4, 100, dtype=torch.long)
    model = noisy(nn.Sequential(nn.Embedding(3, 64)), 8.0)
    clean = model.eval()(tokens)
    noise: Tensor = model.train()(tokens) - clean
    most = 8 / math.sqrt(100 * 64)  # 0.1
    assert float(noise.detach().abs().max()) <= most + 1e-6
    # 25,600 samples of a uniform variable of variance most² / 3; its square deviates by 2 / √45 of most² / √n
    assert abs(float(noise.detach().square().mean()) - most**2 / 3) < 5 * most**2 * 2 / math.sqrt(45 * 25_600)


def test_neftune_takes_the_temporaries_of_transformers_hook() -> None:
    transformers = pytest.importorskip("transformers.integrations.neftune")

    def hooked() -> Workload:
        workload = toy_workload()
        workload.model.embed.neftune_noise_alpha = 5
        workload.model.embed.register_forward_hook(transformers.neftune_post_forward_hook)
        return workload

    def made(trace: Trace) -> int:
        """How many tensors of the size of the embeddings a forward pass makes."""
        size = 8 * 11 * 16 * 4  # samples, tokens of the longest, width
        return int(((trace.requested == size) & (trace.phase == FORWARD) & (trace.step == 0)).sum())

    noise_and_sum = 2
    assert made(simulated("neftune")) == made(simulate(hooked, device="cpu")) == made(simulated("")) + noise_and_sum


def test_a_program_is_frozen_too() -> None:
    with AppliedPlan(Plan.parse("freeze:layers=0,neftune")) as applied:
        model = toy_workload().model
        optimizer = torch.optim.AdamW(model.parameters())
        applied.require_use(built=True)
    (group,) = optimizer.param_groups
    assert {id(one) for one in group["params"]} == {id(one) for one in model.parameters() if one.requires_grad}
    assert not model.embed.weight.requires_grad
    assert model.embed.neftune_noise_alpha == 5.0
