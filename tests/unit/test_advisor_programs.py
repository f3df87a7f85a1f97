"""The search for a program's plan. Here a simulated workload stands for the program: runs take no process."""

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from torch import nn

from memscope import Plan, Workload, simulate
from memscope.advisor.advice import Advice
from memscope.advisor.programs import ProgramAdvisor
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.cost import step_seconds
from memscope.errors import TargetError
from memscope.program.offers import with_offers
from memscope.program.request import Offers
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies import available

DEVICE = get_device("a100-40gb")
LAYERS = 5


def build(layers=LAYERS):
    width = 512
    blocks = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)]
    return Workload(
        model=nn.Sequential(*blocks) if layers else nn.Linear(width, width),
        batches=[torch.randn(4096, width)],
        loss=lambda model, x: model(x).square().mean(),
        optimizer_factory=torch.optim.AdamW,
        name="toy",
    )


@cache
def simulated(plan, capacity_bytes, layers=LAYERS):
    device = dataclasses.replace(DEVICE, capacity_bytes=capacity_bytes)
    return simulate(lambda: build(layers), device=device, strategies=plan)


class Program:
    """Runs a workload as a program."""

    def __init__(self, budget_bytes, layers=LAYERS, always="", fails=()):
        self.budget_bytes, self.layers, self.always, self.fails = budget_bytes, layers, Plan.parse(always), fails
        self.plans = []

    def __call__(self, plan):
        self.plans.append(plan)
        if plan in self.fails:
            raise TargetError(f"it failed with {plan}\nand more")
        asks = available().keys() - {strategy.name for strategy in self.always.strategies}
        offers = with_offers(Offers(), build(self.layers), asks, "", lambda strategy, model: [])
        return simulated(plan, self.budget_bytes, self.layers), offers

    def advice(self, allow=()) -> Advice:
        settings = AllocatorSettings()
        return ProgramAdvisor(self, "train.py", DEVICE, self.budget_bytes, settings, self.always, allow).advice()


def fitting(budget_bytes, plan="optim:fused"):
    """By number of first layers that are checkpointed, whether that fits: every number is simulated."""
    texts = [plan, *(f"{plan},ckpt:layers={'+'.join(map(str, range(count)))}" for count in range(1, LAYERS + 1))]
    return [simulated(text, budget_bytes).meta["out_of_memory"] is None for text in texts]


@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_as_few_of_the_first_layers_are_checkpointed_as_fit(wanted):
    plenty = DEVICE.capacity_bytes
    text = "optim:fused,ckpt:layers=" + "+".join(map(str, range(wanted)))
    meta = simulated(text, plenty).meta
    budget = meta["peak_reserved"] + meta["context"]
    fewest = fitting(budget).index(True)
    program = Program(budget, always="optim:fused")
    advice = program.advice()
    assert advice.feasible
    assert sum(option == "full" for option in advice.layers.values()) == fewest
    assert [*advice.layers.values()] == ["full"] * fewest + ["none"] * (LAYERS - fewest)
    assert advice.peak.device <= budget
    assert advice.overhead_vs_none > 0 >= advice.overhead_vs_all
    assert len(program.plans) == len(set(program.plans)) <= 2 + 3  # none, all, and log2(5) between them
    assert f"The program was run {len(program.plans)} times" in advice.notes[0]


def test_no_combination_with_first_layers_checkpointed_that_fits_is_faster():
    meta = simulated("optim:fused,ckpt:layers=0-2", DEVICE.capacity_bytes).meta
    budget = meta["peak_reserved"] + meta["context"]
    program = Program(budget)
    advice = program.advice()
    texts = ["", "optim:fused", "optim:foreach=false"]
    layers = ["", "ckpt:layers=0", *(f"ckpt:layers=0-{last}" for last in range(1, LAYERS))]
    every = [simulated(",".join(filter(None, both)), budget) for both in itertools.product(texts, layers)]
    seconds = [sum(step_seconds(trace, 1).values()) for trace in every if trace.meta["out_of_memory"] is None]
    assert advice.step_seconds == pytest.approx(min(seconds))
    # The three combinations, all layers and a bisection for the fastest, and one run that rules out each of the others.
    assert len(program.plans) <= 3 + 1 + 3 + 2


def test_another_optimizer_is_tried_beside_the_exact_settings_where_it_is_allowed():
    program = Program(DEVICE.capacity_bytes, layers=0)
    program.advice(["optim"])
    assert set(program.plans) == {"", "optim:fused", "optim:foreach=false", "optim:adamw-8bit"}


class NeedsAllWithFused(Program):
    """With the fused optimizer, which is faster, it fits only with every layer checkpointed."""

    def __call__(self, plan):
        trace, offers = super().__call__(plan)
        if "fused" in plan and not plan.endswith("ckpt"):
            trace = dataclasses.replace(trace, meta={**trace.meta, "out_of_memory": {"step": 0}})
        return trace, offers


def test_a_combination_that_needs_fewer_checkpoints_is_preferred_to_one_that_is_faster_without():
    meta = simulated("ckpt:layers=0", DEVICE.capacity_bytes).meta
    program = NeedsAllWithFused(meta["peak_reserved"] + meta["context"])
    advice = program.advice()
    assert program.plans.index("optim:fused,ckpt") < program.plans.index("ckpt:layers=0")
    assert advice.strategies == ()
    assert [*advice.layers.values()] == ["full", *["none"] * (LAYERS - 1)]


def test_where_it_fits_the_fastest_combination_of_strategies_is_the_plan():
    program = Program(DEVICE.capacity_bytes)
    advice = program.advice()
    plain = {plan: simulated(plan, DEVICE.capacity_bytes) for plan in program.plans if "ckpt" not in plan}
    assert set(plain) == {"", "optim:fused", "optim:foreach=false"}
    assert advice.strategies == ("optim:fused",)
    assert advice.layers == {}
    assert advice.untried == ()
    assert str(advice.plan) == "optim:fused"


def test_a_strategy_that_changes_the_mathematics_is_used_only_if_it_is_allowed():
    without, allowed = Program(DEVICE.capacity_bytes), Program(DEVICE.capacity_bytes)
    without.advice()
    advice = allowed.advice(["lora"])
    assert not any("lora" in plan for plan in without.plans)
    assert "lora" in allowed.plans
    assert "lora:r=8,alpha=16.0" in advice.untried


def test_where_nothing_fits_the_least_is_shown_and_what_would_help():
    program = Program(DEVICE.context_bytes + 40 * 2**20, always="optim:fused")
    advice = program.advice()
    assert not advice.feasible
    assert [*advice.layers.values()] == ["full"] * LAYERS
    assert "--allow bf16: " in advice.binding.helps
    assert "--allow lora: " in advice.binding.helps
    assert all("lora" not in point.strategies for point in advice.front)
    assert advice.minimum_bytes == advice.peak.device


def test_a_model_without_layers_gets_no_checkpoints_and_a_plan_that_fails_is_a_note():
    program = Program(DEVICE.capacity_bytes, layers=0, fails=["optim:fused"])
    advice = program.advice()
    assert advice.overhead_vs_all is None
    assert "Checkpointing was not tried: the program's model has no layers" in advice.notes[0]
    assert advice.notes[1] == 'with "optim:fused" the program cannot be run: it failed with optim:fused'
    assert advice.strategies != ("optim:fused",)
