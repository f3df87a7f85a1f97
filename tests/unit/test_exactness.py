"""Which strategies keep the mathematics of which models, and what decides by it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from memscope import Workload, advise
from memscope.advisor.combinations import combinations, forbidden
from memscope.errors import MemscopeError
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies import Plan
from memscope.strategies.ckpt import Checkpoint, LayerPlan
from memscope.strategies.ga import GradientAccumulation
from memscope.strategies.plugins import called
from memscope.testing import toy_workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step

WIDTH, ROWS, LAYERS = 64, 4096, 6


class Layer(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.branch = nn.Sequential(nn.GELU(), norm or nn.Identity())

    def forward(self, x):
        return x + self.down(self.branch(self.up(x)))


def workload(*norms):
    return Workload(
        model=nn.Sequential(*[Layer(norm) for norm in norms]),
        batches=[torch.ones(ROWS, WIDTH)],
        loss=lambda model, x: model(x).square().mean(),
        optimizer_factory=torch.optim.AdamW,
        name="mine",
    )


def is_exact(spec, built):
    (strategy,) = Plan.parse(spec).strategies
    return called(strategy, "is_exact", built)


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(4 * WIDTH), True),
    "group norm": (lambda: nn.GroupNorm(4, 4 * WIDTH), True),
    "instance norm": (lambda: nn.InstanceNorm1d(4 * WIDTH), True),
    "dropout": (lambda: nn.Dropout(0.1), True),
    "batch norm": (lambda: nn.BatchNorm1d(4 * WIDTH), False),
    "batch norm in evaluation": (lambda: nn.BatchNorm1d(4 * WIDTH).eval(), False),  # training begins with .train()
    "batch norm without statistics": (lambda: nn.BatchNorm1d(4 * WIDTH, track_running_stats=False), False),
    "synchronized batch norm": (lambda: nn.SyncBatchNorm(4 * WIDTH), False),
    "instance norm with statistics": (lambda: nn.InstanceNorm1d(4 * WIDTH, track_running_stats=True), False),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4 * WIDTH, 4 * WIDTH)), False),
    "spectral norm, old": (lambda: spectral_norm(nn.Linear(4 * WIDTH, 4 * WIDTH)), False),
}


@pytest.mark.parametrize(("norm", "expected"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("spec", ["ga:steps=4", "ckpt", "ckpt:layers=1"])
def test_accumulation_and_checkpointing_are_exact_without_statistics_of_batches(spec, norm, expected):
    assert is_exact(spec, workload(None, norm())) is expected


def test_the_number_of_micro_batches_that_a_workload_has_is_exact():
    assert is_exact("ga:steps=1", workload(nn.BatchNorm1d(4 * WIDTH)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["full", "none"], True),
        (["none", "full"], False),
        (["full", "offload"], True),
        (["full:2", "within:0"], False),
        (["none", "recompute:up"], True),
        (["none", "recompute:up+branch"], False),
        (["none", "save:up/aten.addmm"], False),
    ],
)
def test_checkpointing_is_exact_if_only_layers_without_batch_norm_run_again(options, expected):
    plan = LayerPlan({str(index): option for index, option in enumerate(options)})
    assert Checkpoint.of(plan).is_exact(workload(None, nn.BatchNorm1d(4 * WIDTH))) is expected


@pytest.mark.parametrize("layers", ["0", "1"])
def test_a_checkpointed_batch_norm_counts_its_batches_twice(layers):
    built = workload(None, nn.BatchNorm1d(4 * WIDTH))
    Plan.parse(f"ckpt:layers={layers}").apply(built)
    training = Training.start(built, "cpu", lambda data: data)
    run_step(training, micro_batches(built, built.batches[0]))
    assert built.model[1].branch[1].num_batches_tracked == (1 if layers == "0" else 2)


@pytest.mark.parametrize("spec", ["lora", "amp", "bf16", "optim:fused"])
def test_other_strategies_are_as_exact_as_they_declare(spec):
    (strategy,) = Plan.parse(spec).strategies
    assert strategy.is_exact(toy_workload(batch_norm=True)) is strategy.exact


def names(plans):
    return {strategy.name for plan in plans for strategy in plan.strategies}


def test_what_is_not_exact_for_the_workload_needs_to_be_allowed():
    plain, normed = toy_workload(), toy_workload(batch_norm=True)
    assert "ga" in names(combinations(plain, Plan(), ()))
    assert "ga" not in forbidden(plain, Plan(), ())
    assert "ga" not in names(combinations(normed, Plan(), ()))
    assert "ga" in forbidden(normed, Plan(), ())
    assert "ga" in names(combinations(normed, Plan(), ("ga",)))
    assert "ga" not in forbidden(normed, Plan(), ("ga",))


def test_is_exact_answers_true_or_false():
    class Unsure(GradientAccumulation):
        def is_exact(self, workload):
            return None

    with pytest.raises(MemscopeError, match=r"is_exact\(\) returned None, expected True or False"):
        called(Unsure(), "is_exact", toy_workload())


def build(is_normed):
    return workload(*[nn.BatchNorm1d(4 * WIDTH) if is_normed(index) else None for index in range(LAYERS)])


def test_advice_recomputes_and_splits_no_batch_norm_unless_that_is_allowed():
    tried = partial(advise, budget="600MB", device="a100-40gb", strategies="optim:fused")  # needs 645 MB as it is
    refused = tried(lambda: build(lambda index: True))
    assert refused.feasible
    assert set(refused.layers.values()) == {"offload"}
    assert not any(spec.startswith("ga") for spec in refused.strategies)
    assert any("6 of 6 layers have batch norm and are not recomputed" in note for note in refused.notes)
    for point in refused.front:
        assert not {"full", "save", "recompute"} & set(point.recomputed.split())
        assert not any(spec.startswith("ga") for spec in point.strategies)
    allowed = tried(lambda: build(lambda index: True), allow=["ckpt"])
    assert "full" in allowed.layers.values()
    assert not any("batch norm" in note for note in allowed.notes)


WITHOUT_OFFLOADING = replace(get_device("a100-40gb"), host_bytes_per_second=None)


def test_the_least_that_advice_names_recomputes_no_batch_norm():
    advice = advise(lambda: build(lambda index: True), budget="540MB", device=WITHOUT_OFFLOADING)
    assert not advice.feasible
    assert advice.layers == {}


@pytest.mark.usefixtures("kept_workspaces")
def test_advice_recomputes_the_layers_without_batch_norm():
    advice = advise(lambda: build(lambda index: index == 0), budget="620MB", device=WITHOUT_OFFLOADING)
    assert advice.feasible
    assert "1 of 6 layers have batch norm" in advice.notes[0]
    assert advice.layers.pop("0") == "none"
    assert "full" in advice.layers.values()


def test_what_takes_more_than_device_memory_is_combined_only_if_it_is_allowed():
    workload = toy_workload()
    asked = {"backward-step", "offload"}
    assert not asked & names(combinations(workload, Plan(), ()))
    assert asked <= names(combinations(workload, Plan(), asked))
