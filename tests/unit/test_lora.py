"""LoRA: trained and frozen weights, and the computation of the update."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope import simulate
from memscope.analysis.chosen import strategies_of
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.lora import LoRA, LoRALinear, adapt, merge, unmerge
from memscope.strategies.lora.linear import linear_layers
from memscope.strategies.lora.targets import auto_targets
from memscope.testing import toy_workload
from memscope.workload.description import Workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step

DIM = 16  # in the toy: wq, wk, wv, wo are [16, 16], up is [32, 16], down is [16, 32], head is [40, 16]


def toy(plan: str = "", *, dtype: torch.dtype = torch.float32) -> Workload:
    torch.manual_seed(0)
    workload = toy_workload()
    workload.model.to(dtype)
    Plan.parse(plan).apply(workload)
    return workload


def tokens(workload: Workload) -> Tensor:
    (piece,) = workload.split(workload.batches[0], 1)
    assert isinstance(piece, Tensor)
    return piece.clamp(min=0)


def adapters(workload: Workload) -> list[LoRALinear]:
    return [module for module in workload.model.modules() if isinstance(module, LoRALinear)]


def adapted(layer: nn.Module, *, r: int, alpha: float) -> LoRALinear:
    """A copy of a layer, adapted without dropout."""
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    adapt(model, ["layer"], r=r, alpha=alpha, dropout=0.0)
    assert isinstance(model["layer"], LoRALinear)
    return model["layer"]


def with_updates(plan: str) -> Workload:
    """A float64 toy model whose updates are not zero, as after some training."""
    workload = toy(plan, dtype=torch.float64)
    for layer in adapters(workload):
        nn.init.normal_(layer.lora_b, std=0.1)
    return workload


@pytest.mark.parametrize(
    ("plan", "trainable"),
    [
        ("lora:r=4", 2 * 2 * 4 * (DIM + DIM)),  # wq and wv in two layers; A [4, 16] and B [16, 4] each
        ("lora:r=2,targets=up+head", 2 * 2 * (DIM + 32) + 2 * (DIM + 40)),
        ("lora:r=3,targets=blocks.1.wo", 3 * (DIM + DIM)),
    ],
)
def test_only_two_small_matrices_of_each_chosen_layer_are_trained(plan: str, trainable: int) -> None:
    total = toy().parameter_counts()[0]
    assert toy(plan).parameter_counts() == (total + trainable, trainable)


def test_everything_else_is_frozen() -> None:
    trained = {name for name, parameter in toy("lora:r=4").model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"blocks.{block}.{layer}.{part}" for block in (0, 1) for layer in ("wq", "wv") for part in ("lora_a", "lora_b")
    }


@pytest.mark.parametrize("bias", [True, False])
def test_the_update_is_b_a_x_times_alpha_over_r(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    layer = adapted(base, r=3, alpha=12.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(7, 6, dtype=torch.float64)
    by_hand = torch.stack([base(row) + (12 / 3) * (layer.lora_b @ (layer.lora_a @ row)) for row in x])
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-12, atol=1e-12)


def test_a_starts_gaussian_with_deviation_one_over_r_and_b_at_zero() -> None:
    torch.manual_seed(0)
    layer = adapted(nn.Linear(4096, 8), r=4, alpha=8.0)
    # 4·4096 samples: the mean deviates by 0.25/√16384 ≈ 0.002, the deviation by 0.25/√32768 ≈ 0.0014; five times that.
    assert abs(layer.lora_a.mean().item()) < 0.01
    assert abs(layer.lora_a.std().item() - 1 / 4) < 0.007
    assert not layer.lora_b.any()


def test_the_output_is_unchanged_at_the_start() -> None:
    base, adapted = toy(), toy("lora:r=4,dropout=0.5,targets=wq+wv+up+down+head")
    assert len(adapters(adapted)) == 2 * 4 + 1
    assert torch.equal(adapted.model(tokens(adapted)), base.model(tokens(base)))


def first_loss(workload: Workload) -> Tensor:
    training = Training.start(workload, "cpu", lambda data: data)
    return run_step(training, micro_batches(workload, workload.batches[0]))


def test_the_first_loss_is_the_baselines_and_the_second_is_not() -> None:
    workload = toy("lora:r=4")
    assert torch.equal(first_loss(workload), first_loss(toy()))
    assert not torch.equal(first_loss(workload), first_loss(toy()))


def test_lora_leaves_the_embedding_gradient_absent() -> None:
    workload = toy("lora:r=4")
    (piece,) = micro_batches(workload, workload.batches[0])
    workload.loss(workload.model, piece.data).backward()
    assert workload.model.get_submodule("embed").weight.grad is None
    with_gradient = {name for name, parameter in workload.model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in workload.model.named_parameters() if parameter.requires_grad}


def test_names_values_and_memory_of_the_base_weights_are_unchanged() -> None:
    workload = toy()
    before = {name: (value.data_ptr(), value.clone()) for name, value in workload.model.state_dict().items()}
    Plan.parse("lora:r=4,targets=wq+up").apply(workload)
    after = workload.model.state_dict()
    added = {f"blocks.{i}.{layer}.lora_{part}" for i in (0, 1) for layer in ("wq", "up") for part in "ab"}
    assert set(after) == set(before) | added
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address
        assert torch.equal(after[name], value)


def test_merging_computes_the_same_and_changes_the_weights() -> None:
    workload = with_updates("lora:r=4,dropout=0,targets=wq+up")
    x = tokens(workload)
    unmerged, weights = workload.model(x), [layer.weight.clone() for layer in adapters(workload)]
    merge(workload.model)
    torch.testing.assert_close(workload.model(x), unmerged, rtol=1e-12, atol=1e-12)
    for layer, weight in zip(adapters(workload), weights, strict=True):
        torch.testing.assert_close(layer.weight, weight + 32 / 4 * layer.lora_b @ layer.lora_a, rtol=1e-12, atol=1e-12)
    assert (unmerged - toy(dtype=torch.float64).model(x)).abs().max().item() > 0.01  # the updates have an effect


def test_merging_twice_changes_nothing_more() -> None:
    workload = with_updates("lora:r=4")
    merge(workload.model)
    once = [layer.weight.clone() for layer in adapters(workload)]
    merge(workload.model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(adapters(workload), once, strict=True))


def test_unmerging_restores_the_weights_and_the_update() -> None:
    workload = with_updates("lora:r=4,dropout=0")
    x, weights = tokens(workload), [layer.weight.clone() for layer in adapters(workload)]
    unmerged = workload.model(x)
    unmerge(workload.model)  # not merged yet: nothing to unmerge
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(adapters(workload), weights, strict=True))
    merge(workload.model)
    unmerge(workload.model)
    for layer, weight in zip(adapters(workload), weights, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-15 * 8 * DIM)
    torch.testing.assert_close(workload.model(x), unmerged, rtol=1e-12, atol=1e-12)


def test_dropout_acts_on_the_update_alone_and_only_in_training() -> None:
    workload = with_updates("lora:r=4,dropout=0.5")
    x = tokens(workload)
    workload.model.train()
    assert not torch.equal(workload.model(x), workload.model(x))
    workload.model.eval()
    evaluated = workload.model(x)
    assert torch.equal(evaluated, workload.model(x))
    merge(workload.model)
    workload.model.train()
    torch.testing.assert_close(workload.model(x), evaluated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_evaluation_mode_stays_in_it(training: bool) -> None:
    workload = toy()
    workload.model.train(training)
    Plan.parse("lora").apply(workload)
    assert {module.training for module in workload.model.modules()} == {training}


def refused(plan: str, workload: Workload) -> str:
    with pytest.raises(UsageError) as caught:
        Plan.parse(plan).apply(workload)
    assert not adapters(workload)
    return str(caught.value)


@pytest.mark.parametrize("target", ["wqq", "blocks.0.wqq"])
def test_a_target_that_matches_nothing_is_refused_with_the_nearest_name(target: str) -> None:
    message = refused(f"lora:targets=wv+{target}", toy())
    assert re.search(
        rf'lora: targets={target} matches no linear layer of "toy": .*Valid: down, head, up, wk, wo, wq, wv$', message
    )
    assert 'did you mean "wq"?' in message or target.startswith("blocks")


def test_only_whole_names_match_and_only_linear_layers() -> None:
    assert "targets=q matches no linear layer" in refused("lora:targets=q", toy())
    assert "targets=embed matches no linear layer" in refused("lora:targets=embed", toy())


def test_a_layer_that_shares_its_weight_is_refused_with_the_other_name() -> None:
    workload = toy()
    workload.model.get_submodule("head").weight = workload.model.get_submodule("embed").weight
    message = refused("lora:targets=head", workload)
    assert 'targets=head matches "head", which shares its weight with "embed": remove it.' in message
    assert message.endswith("Valid: down, up, wk, wo, wq, wv")


def test_a_layer_with_two_names_is_refused() -> None:
    workload = toy()
    first, second = (workload.model.get_submodule(f"blocks.{i}") for i in (0, 1))
    second.wq = first.wq
    message = refused("lora:targets=wq", workload)
    assert 'targets=wq matches "blocks.0.wq", which shares its weight with "blocks.1.wq": remove it.' in message


def test_layers_of_a_block_that_is_used_twice_can_be_adapted() -> None:
    workload = toy()
    blocks = workload.model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    blocks[1] = blocks[0]
    Plan.parse("lora:r=4").apply(workload)
    assert workload.parameter_counts()[1] == 2 * 4 * (DIM + DIM)


def test_settings_out_of_their_range_are_refused_all_at_once() -> None:
    message = refused("lora:r=0,dropout=1", toy())
    assert "lora: r=0 is not a rank: choose at least 1" in message
    assert "lora: dropout=1.0 is not a probability: choose at least 0 and less than 1" in message


# What `auto` and `all-linear` choose.


def named(names: list[str]) -> Workload:
    """Two repeated layers with linear modules of these names, and a head."""
    blocks = [nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2)]
    layers = nn.ModuleList(nn.Sequential(block) for block in blocks)
    model = nn.ModuleDict({"blocks": layers, "head": nn.Linear(4, 8)})
    return Workload(model, [], lambda m, x: x.sum(), torch.optim.AdamW)


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (["wq", "wk", "wv"], ("wq", "wv")),
        (["q_proj", "k_proj", "v_proj", "up_proj"], ("q_proj", "v_proj")),
        (["query", "key", "value"], ("query", "value")),
        (["qkv", "out"], ("qkv", "out")),
        (["qkv", "head"], ("qkv", "0.head")),  # not the head outside the layers
    ],
)
def test_auto_is_query_and_value_or_every_linear_layer_of_the_repeated_layers(
    names: list[str], targets: tuple[str, ...]
) -> None:
    workload = named(names)
    Plan.parse("lora").apply(workload)
    adapted = {name for name, module in workload.model.named_modules() if isinstance(module, LoRALinear)}
    assert adapted == {f"blocks.{i}.0.{target.rpartition('.')[2]}" for i in (0, 1) for target in targets}
    assert auto_targets(named(names).model) == targets


def test_what_auto_chose_is_in_the_trace_and_reads_back_as_the_same_plan() -> None:
    trace = simulate(toy_workload(), strategies="lora:r=4")
    assert trace.meta["strategies"] == ["lora:r=4"]
    assert trace.meta["chosen"] == {"lora": {"targets": "wq+wv"}}
    assert "chosen" not in simulate(toy_workload(), strategies="lora:r=4,targets=wq+wv").meta
    assert strategies_of(trace) == ["lora:r=4 (targets=wq+wv)"]
    assert trace.meta["parameters"] == simulate(toy_workload(), strategies="lora:r=4,targets=wq+wv").meta["parameters"]


def test_candidates_are_three_ranks_of_one_scale() -> None:
    # The defaults' scale is alpha / r = 32 / 16.
    found = [LoRA.Config(r=16, alpha=32.0), LoRA.Config(r=8, alpha=16.0), LoRA.Config(r=64, alpha=128.0)]
    assert LoRA.candidates(named(["wq", "wv"])) == found


def test_a_model_without_linear_layers_to_adapt_has_no_candidate_and_is_refused() -> None:
    tied = named(["qkv"])
    one, other = (tied.model.get_submodule(f"blocks.{i}.0.qkv") for i in (0, 1))
    one.weight = other.weight
    del tied.model.head
    assert LoRA.candidates(tied) == []
    convolution = Workload(nn.Conv1d(2, 2, 1), [], lambda m, x: x.sum(), torch.optim.AdamW)
    assert LoRA.candidates(convolution) == []
    for targets in ("auto", "all-linear"):
        message = refused(f"lora:targets={targets}", convolution)
        assert f'lora: targets={targets} finds no linear layer to adapt in "workload": remove this strategy' in message


def test_all_linear_is_every_linear_layer_but_the_output_head() -> None:
    # In the toy: wq, wk, wv, wo, up and down in two layers, and the head behind them.
    workload = toy("lora:targets=all-linear")
    found = [name for name, module in workload.model.named_modules() if isinstance(module, LoRALinear)]
    assert found == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("wq", "wk", "wv", "wo", "up", "down")]


@pytest.mark.parametrize("word", ["auto", "all-linear"])
def test_auto_and_all_linear_stand_alone(word: str) -> None:
    with pytest.raises(UsageError, match=f"targets={word} stands alone: leave {word} or the other targets out"):
        Plan.parse(f"lora:targets=wq+{word}")


def test_a_subclass_of_linear_is_adapted_and_computes_as_its_class_does() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor, times: float = 2.0) -> Tensor:
            return times * super().forward(x)

    base = Doubled(6, 5, dtype=torch.float64)
    layer = adapted(base, r=3, alpha=12.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(7, 6, dtype=torch.float64)
    assert isinstance(layer, Doubled)
    by_hand = 3.0 * F.linear(x, base.weight, base.bias) + (12 / 3) * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x, times=3.0), by_hand, rtol=1e-12, atol=1e-12)


def test_layers_that_are_adapted_or_not_computed_as_linear_layers_are_left_alone() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4, bias=False)
            self.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)

    done = adapted(nn.Linear(4, 4), r=1, alpha=1.0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleList([nn.MultiheadAttention(4, 2), Packed(), normed, nn.LazyLinear(4), done, nn.Linear(4, 4)])
    assert linear_layers(model) == ["5"]
