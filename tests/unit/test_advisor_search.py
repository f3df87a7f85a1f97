"""The advisor's search: the simulations it runs, and those it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from memscope import Strategy, Workload, simulate, strategies
from memscope.advisor import combinations as advisor_combinations
from memscope.advisor.advise import advise
from memscope.advisor.combinations import combinations
from memscope.advisor.measure.layers import LayerList
from memscope.advisor.measure.runner import Answer, Asker, InProcess, Probe
from memscope.advisor.search import Search
from memscope.allocator.settings import AllocatorSettings
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies import Plan, Stage
from memscope.strategies import plan as plan_module
from memscope.strategies.ckpt import LayerPlan
from tests.small_chain import LAYERS, ROWS, WIDTH, build

DEVICE = get_device("a100-40gb")
WEIGHTS_BYTES = LAYERS * 2 * 2 * (WIDTH * 2 * WIDTH) * 4


@dataclass
class Noted:
    """A runner that records its probes, and claims to run `width` at a time."""

    width: int = 1
    probes: list[Probe] = field(default_factory=list)

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        self.probes += probes
        return InProcess(build, DEVICE).run(probes, done)


def searched(runner: Noted, reserved_bytes: int, strategies: str, allow: Sequence[str] = ()) -> Search:
    workload = build()
    asker = Asker(runner, lambda what, done, needed: None)
    budget_bytes = reserved_bytes + DEVICE.context_bytes
    layers = LayerList.of(workload.model)
    search = Search(asker, layers, DEVICE, AllocatorSettings(), budget_bytes, lambda s: s.is_exact(workload))
    search.run(combinations(workload, Plan.parse(strategies), allow))
    return search


def plain_bytes(strategies: str) -> int:
    return int(simulate(build, device=DEVICE, strategies=strategies).meta["peak_reserved"])


def test_what_was_asked_before_is_not_simulated_again() -> None:
    runner = Noted()
    ask = Asker(runner, lambda what, done, needed: None)
    probe = Probe("optim:fused", LayerPlan({"layers.0": "full"}, {}))
    first, second = ask("one", [probe, replace(probe)])
    (third,) = ask("two", [probe])
    assert first is second is third
    ask("three", [replace(probe, strategies="")])
    assert runner.probes == [probe, replace(probe, strategies="")]


def test_combinations_that_no_checkpoints_make_fit_are_not_tried_with_them() -> None:
    """Weights, gradients and AdamW's two moments take four times the weights, and checkpoints free none of that."""
    runner = Noted()
    search = searched(runner, 3 * WEIGHTS_BYTES, "ga:steps=1")
    assert search.best is None
    assert not search.tried.references
    assert all(probe.layers is None for probe in runner.probes)


def test_no_checkpoints_are_planned_for_what_another_combination_beats() -> None:
    """Without `fused`, the optimizer's step is slower and takes temporaries of all weights."""
    search = searched(Noted(), plain_bytes("optim:fused,ga:steps=1") - 8 * 2**20, "ga:steps=1")
    assert search.best is not None
    assert search.best.layers is not None
    assert set(search.tried.plain) == {"ga:steps=1", "optim:fused,ga:steps=1", "optim:foreach=false,ga:steps=1"}
    assert list(search.tried.references) == ["optim:fused,ga:steps=1"]


class Rows(Strategy):
    """Train on some of the rows of each batch."""

    name, stage, exact, changes = "rows", Stage.STEP, False, "the data"

    @dataclass(frozen=True)
    class Config:
        """Which."""

        count: int = ROWS - 4

    def apply(self, workload: Workload) -> None:
        whole = workload.split
        workload.split = lambda batch, parts: whole(batch[: self.config.count], parts)


@pytest.mark.parametrize(("other", "taken"), [(ROWS - 8, ROWS - 4), (ROWS // 2, ROWS // 2)])
def test_a_setting_that_saves_next_to_nothing_does_not_replace_the_preferred_one(
    other: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tried(Rows):
        @classmethod
        def candidates(cls, workload: Workload) -> Sequence[Rows.Config]:
            return [cls.Config(), cls.Config(other)]

    everything = {**strategies.available(), "rows": Tried}
    monkeypatch.setattr(plan_module, "available", lambda: everything)
    monkeypatch.setattr(advisor_combinations, "available", lambda: everything)
    slow = replace(DEVICE, measured_bandwidth_bytes_per_second=1e10)  # kernels longer than their launches
    monkeypatch.setitem(globals(), "DEVICE", slow)
    best = searched(Noted(), 2**30, "optim:fused,ga:steps=1", ["rows"]).best
    assert best is not None
    (rows,) = (strategy for strategy in Plan.parse(best.strategies).strategies if strategy.name == "rows")
    assert rows.config.count == taken


def test_side_by_side_a_plan_is_found_that_is_as_true() -> None:
    reserved_bytes = plain_bytes("optim:fused,ga:steps=1") - 12 * 2**20
    one, two = (searched(Noted(width), reserved_bytes, "optim:fused,ga:steps=1").best for width in (1, 2))
    assert one is not None
    assert two is not None
    assert one.certificate is not None
    assert two.certificate is not None
    assert two.seen.trace.meta["out_of_memory"] is None
    assert two.certificate.lower_bound_seconds == one.certificate.lower_bound_seconds <= two.seconds


def test_a_batch_of_many_samples_is_split_into_at_most_256_and_the_proof_names_the_others() -> None:
    split_into = []

    def wide() -> Workload:
        def split(batch: Tensor, parts: int) -> list[Tensor]:
            split_into.append(parts)
            return list(batch.chunk(parts))

        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        return Workload(
            model, [torch.ones(2**20, 4)], lambda m, x: m(x).square().mean(), torch.optim.SGD, name="wide", split=split
        )

    found = advise(wide, budget="30GB", device=DEVICE)
    assert found.feasible
    assert max(split_into) == 256
    assert found.untried[-12:] == tuple(f"ga:steps={2**power}" for power in range(9, 21))
    assert "not tried: " in found.proof
