"""Checkpoint plans against their own simulations: what the planner predicts must be what the simulation shows."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from memscope import Plan, simulate
from memscope.advisor import planning as planning_module
from memscope.advisor.measure.costs import LayerCosts, measure
from memscope.advisor.measure.layers import LayerList
from memscope.advisor.measure.probe import rounded
from memscope.advisor.measure.reference import Reference, full_probe, none_probe
from memscope.advisor.measure.runner import Asker, InProcess, require
from memscope.advisor.plan.planner import evaluate
from memscope.advisor.planning import Found, Planning
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.cost import last_step_seconds
from memscope.simulation.devices.catalogue import get_device
from memscope.simulation.devices.roofline import GAP_SECONDS
from memscope.simulation.devices.timeline import LAUNCH_SECONDS
from memscope.strategies.ckpt import Checkpoint, LayerPlan
from tests.small_chain import LAYERS, ROWS, WIDTH, build

DEVICE = get_device("a100-40gb")
STRATEGIES = "optim:fused,ga:steps=1"
MIB = 2**20
NAMES = tuple(f"layers.{index}" for index in range(LAYERS))
ASK = Asker(InProcess(build, DEVICE, AllocatorSettings()), lambda what, done, needed: None)


@cache
def reference() -> Reference:
    layers = LayerList.of(build().model)
    none, full = ASK("", [probe(STRATEGIES, layers, DEVICE.capacity_bytes or 0) for probe in (none_probe, full_probe)])
    return Reference(STRATEGIES, layers, require(none), require(full))


@cache
def costs() -> LayerCosts:
    return measure(lambda probes: ASK("", probes), reference(), DEVICE)


def planned(known: LayerCosts) -> tuple[Planning, Found | None]:
    """What the planner finds with these costs for a budget 12 MiB below that of no checkpointing."""
    budget = int(reference().none.trace.meta["peak_reserved"]) - 12 * MIB + DEVICE.context_bytes
    planning = Planning(ASK, reference().layers, DEVICE, AllocatorSettings(), budget)
    planning._costs[STRATEGIES] = known
    return planning, planning.within(reference())


def mistaken(kept_bytes: int) -> LayerCosts:
    """Costs in which a layer without checkpoints keeps more or fewer bytes than it does, and its backward too."""
    measured = dict(costs().measured)
    for key, one in measured.items():
        if key[1] == "none":
            seen = tuple(
                dataclasses.replace(
                    layer,
                    kept_bytes=layer.kept_bytes + kept_bytes,
                    backward_rise_bytes=layer.backward_rise_bytes + kept_bytes,
                )
                for layer in one.seen
            )
            measured[key] = dataclasses.replace(one, seen=seen)
    return dataclasses.replace(costs(), measured=measured)


def peaks(planning: Planning, found: Found) -> tuple[int, int]:
    """The peak that the planner predicts for a plan, and that of the plan's simulation, of rounded requests."""
    assert found.layers is not None
    chain = planning._costs[STRATEGIES].chain()
    choices = [
        next(choice for choice in chain.choices[index] if choice.option == option)
        for index, option in enumerate(found.layers.layers.values())
        if not option.startswith("within:")
    ]
    trace = found.seen.trace
    return evaluate(chain, choices).peak_bytes, int(dataclasses.replace(trace, size=rounded(trace)).allocated.max())


@pytest.mark.parametrize("kept_bytes", [0, MIB, -MIB])
def test_the_peak_of_a_plan_is_that_of_its_simulation_also_where_costs_are_mistaken_at_first(kept_bytes: int) -> None:
    planning, found = planned(mistaken(kept_bytes))
    assert found is not None
    predicted, simulated = peaks(planning, found)
    assert predicted == simulated
    assert planning.refused == []
    assert bool(planning._costs[STRATEGIES].settled) == bool(kept_bytes)  # corrected only where it must be


def test_a_plan_whose_simulation_does_not_correct_its_costs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerCosts, "settle", lambda self, plan, seen: self)
    planning, found = planned(mistaken(MIB))
    assert found is None
    [told] = planning.refused
    assert told.endswith(": refused")
    assert "was predicted to peak at" in told


def test_offloading_costs_the_copies_to_the_host_and_back() -> None:
    """A layer keeps its input, two hidden results of twice the width, and the input of its second half."""
    rate = DEVICE.host_bytes_per_second
    assert rate is not None
    kept = ROWS * WIDTH * 4 * (1 + 2 + 1 + 2)

    def seconds(option: str) -> float:
        options = dict.fromkeys(NAMES, "none") | {NAMES[2]: option}
        plan = Plan.of(*Plan.parse(STRATEGIES).strategies, Checkpoint.of(LayerPlan(options)))
        return last_step_seconds(simulate(build, device=DEVICE, strategies=plan)) or 0.0

    extra = seconds("offload") - seconds("none")
    # The host waits for the 6 copies to it; those back run while it launches what follows. 12 launches, 12 gaps.
    assert kept / rate < extra < 2 * kept / rate + 12 * (LAUNCH_SECONDS + GAP_SECONDS)
    kind = (reference().classes[2],)
    measured = costs().measured
    found = measured[kind, "offload"].seconds - measured[kind, "none"].seconds
    assert found == pytest.approx(extra, abs=5 * LAUNCH_SECONDS)  # beside other neighbours, a few more kernels run


def test_planning_rounds_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that never fits is given up."""
    monkeypatch.setattr(planning_module, "fits", lambda seen: False)
    _, found = planned(costs())
    assert found is None
