"""Budgets, devices and models that the advisor is asked about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memscope import Workload, fit, simulate
from memscope.advisor.advise import advise, budget_of
from memscope.errors import TargetError, UsageError
from memscope.strategies.ckpt import LayerPlan
from memscope.testing.toy import toy_workload
from tests.small_advice import CONTEXT, DEVICE
from tests.small_chain import ROWS, WIDTH, build

pytestmark = pytest.mark.usefixtures("kept_workspaces")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0GB", "zero bytes"),
        ("-4GB", "is not a size"),
        ("many", "is not a size"),
        ("40XB", 'unknown unit "XB"'),
        ("0%", "above 0%"),
        ("120%", "up to 100%"),
        ("x%", "up to 100%"),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        budget_of(text, DEVICE, named=True)


def test_a_share_needs_a_device() -> None:
    assert DEVICE.capacity_bytes is not None
    assert budget_of("50%", DEVICE, named=True) == DEVICE.capacity_bytes // 2
    with pytest.raises(UsageError, match="share of a device"):
        budget_of("50%", DEVICE, named=False)


def test_an_unknown_strategy_in_allow_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r'--allow loro: there is no strategy "loro": did you mean "lora"'):
        advise(build, budget="40GB", device=DEVICE, allow=["loro"])


def test_what_may_be_assumed_is_said_from_python_too() -> None:
    def build_reading_its_loss() -> Workload:
        def loss(model: nn.Module, x: Tensor) -> Tensor:
            value = model(x).square().mean()
            return value if value.item() >= 0 else -value

        return Workload(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [torch.ones(2, 4)], loss, torch.optim.AdamW)

    with pytest.raises(TargetError, match="item"):
        advise(build_reading_its_loss, budget="30GB", device=DEVICE, assume="refuse")
    with pytest.raises(UsageError, match='did you mean "refuse"'):
        advise(build_reading_its_loss, budget="30GB", device=DEVICE, assume="refuze")
    with pytest.raises(TargetError, match="item"):
        fit(lambda micro_batch: build_reading_its_loss(), micro_batch=1, device=DEVICE, assume="refuse")


def test_a_device_without_rates_is_refused() -> None:
    with pytest.raises(UsageError, match='rates of device "gpu" are not known'):
        advise(build, budget="40GB", device="gpu")


def test_a_model_without_repeated_layers_is_taken_apart_into_its_modules() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x)))  # type: ignore[no-any-return]

    def mixed() -> Workload:
        return Workload(Mixed(), [torch.ones(ROWS, WIDTH)], lambda m, x: m(x).sum(), torch.optim.SGD, name="mixed")

    found = advise(mixed, budget="1GB", device=DEVICE, strategies="ga:steps=1")
    assert found.feasible
    assert any("no list of repeated layers" in note for note in found.notes)


def test_a_model_that_is_one_sequence_of_different_modules_gets_a_plan_that_can_be_applied(tmp_path: Path) -> None:
    def sequence() -> Workload:
        model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        return Workload(model, [torch.ones(ROWS, WIDTH)], lambda m, x: m(x).sum(), torch.optim.SGD, name="sequence")

    needed = int(simulate(sequence, device=DEVICE).meta["peak_reserved"]) + CONTEXT
    found = advise(sequence, budget=needed - 2 * 2**20, device=DEVICE, strategies="ga:steps=1")
    assert list(found.layers) == ["0", "1", "2"]
    file = LayerPlan(found.layers, found.made_for).save(tmp_path / "plan.json")
    assert simulate(sequence, device=DEVICE, strategies=f"ckpt:plan={file}").peak.allocated_bytes > 0


def test_a_target_that_fails_is_told_in_words() -> None:
    def broken() -> Workload:
        raise RuntimeError("the data is gone")

    with pytest.raises(TargetError, match=r"failed: RuntimeError: the data is gone \(at .*test_advisor_questions\.py"):
        advise(broken, budget="1GB", device=DEVICE)


def test_a_workload_of_the_user_is_left_as_it_is() -> None:
    workload = toy_workload()
    before = [parameter.clone() for parameter in workload.model.parameters()]
    found = advise(workload, budget="2GB", device=DEVICE, strategies="optim:fused,ga:steps=1")
    assert found.feasible
    after = list(workload.model.parameters())
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
