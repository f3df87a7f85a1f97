"""The advisor's search against trying everything, on models small enough for that."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from memscope import Plan, Workload, simulate
from memscope.advisor import search
from memscope.advisor.advise import advise
from memscope.advisor.combinations import combinations
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.cost import last_step_seconds
from memscope.simulation.device_memory import least_reserved
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies.ckpt import Checkpoint, LayerPlan

DEVICE = get_device("rtx4090")
CONTEXT = DEVICE.context_bytes
MIB = 2**20


class Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class Chain(nn.Module):
    def __init__(self, given: int, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(given, width)
        self.layers = nn.ModuleList(Residual(width, inner) for _ in range(layers))
        self.last = nn.Linear(width, given)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)  # type: ignore[no-any-return]


def workload(given: int, width: int, inner: int, layers: int, *rows: int) -> Workload:
    model = Chain(given, width, inner, layers)
    return Workload(
        model, [torch.ones(*rows, given)], lambda m, x: m(x).square().mean(), torch.optim.AdamW, name="residual"
    )


def build() -> Workload:
    """6 samples: 3 other numbers of micro-batches."""
    return workload(64, 512, 1024, 2, 6, 1024)


@cache
def everything() -> list[tuple[int, float]]:
    """Bytes needed on the device, and seconds, of every combination with no, some and all layers checkpointed."""
    found = []
    for plan in combinations(build(), Plan(), ()):
        for options in (("none", "none"), ("full", "none"), ("full", "full")):
            chosen = LayerPlan(dict(zip(("layers.0", "layers.1"), options, strict=True)))
            trace = simulate(build, device=DEVICE, strategies=Plan.of(*plan.strategies, Checkpoint.of(chosen)))
            seconds = last_step_seconds(trace)
            assert seconds is not None
            found.append((least_reserved(trace, AllocatorSettings()) + CONTEXT, seconds))
    return found


@pytest.fixture
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of the small models' settings are tried at first."""
    monkeypatch.setattr(search, "_MOST_SETTINGS", 2)


@pytest.mark.usefixtures("few_settings")
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_search_finds_what_trying_everything_finds(share: float) -> None:
    needs = sorted(needed for needed, _ in everything())
    budget = needs[0] + 2 * MIB + round(share * (needs[-1] - needs[0]))
    fastest = min(seconds for needed, seconds in everything() if needed <= budget)
    found = advise(build, budget=budget, device=DEVICE)
    assert found.feasible
    assert found.peak.device <= budget
    assert found.certificate is not None
    # Fragmentation is simulated, not planned: what it adds is in the certificate.
    assert found.step_seconds * (1 - found.certificate.fragmentation_gap) <= 1.02 * fastest


def test_nothing_fits_is_said_only_where_trying_everything_finds_nothing() -> None:
    least = min(needed for needed, _ in everything())
    found = advise(build, budget=(least + CONTEXT) // 2, device=DEVICE)
    assert not found.feasible
    assert found.minimum_bytes <= 1.1 * least
    assert found.untried == ()
    assert found.proof.endswith("every combination was tried")


@pytest.mark.usefixtures("few_settings")
def test_the_proof_says_which_combinations_were_not_tried() -> None:
    found = advise(build, budget=CONTEXT + MIB, device=DEVICE)
    assert not found.feasible
    assert found.untried
    first = ", ".join(f'"{text}"' for text in found.untried[:3])
    assert f"not tried: {first}" in found.proof
    assert found.document()["combinations"]["untried"] == list(found.untried)


def test_settings_of_one_strategy_leave_room_for_combinations() -> None:
    """256 samples have 8 other numbers of micro-batches: one of these and the fused step are needed."""

    def rows() -> Workload:
        return workload(16, 256, 1024, 2, 256, 32)

    trace = simulate(rows, device=DEVICE, strategies="optim:fused,ga:steps=16")
    budget = least_reserved(trace, AllocatorSettings()) + CONTEXT
    found = advise(rows, budget=budget, device=DEVICE)
    assert found.feasible
    assert found.step_seconds <= 1.02 * (last_step_seconds(trace) or 0)
