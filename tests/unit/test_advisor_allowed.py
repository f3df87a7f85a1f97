"""The strategies that the advisor may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from memscope import Strategy, Workload
from memscope.advisor.advise import advise
from memscope.advisor.combinations import allowed_names
from memscope.strategies import Stage
from memscope.strategies import plan as plan_module
from tests.small_advice import CONTEXT, DEVICE, advice, budgets
from tests.small_chain import build

pytestmark = pytest.mark.usefixtures("kept_workspaces")


@pytest.mark.parametrize("allow", ["bf16", " bf16 ,amp", ["bf16,amp"], ("bf16",)])
def test_names_may_be_one_text_or_several(allow: str | Sequence[str]) -> None:
    assert allowed_names(allow)[0] == "bf16"
    assert set(allowed_names(allow)) <= {"bf16", "amp"}


def test_what_changes_the_mathematics_is_used_only_when_allowed() -> None:
    refused, allowed = advice(budgets()[2]), advice(budgets()[2], ("bf16",))
    assert not any(spec.startswith(("bf16", "amp", "lora")) for spec in refused.strategies)
    assert "bf16" in allowed.strategies


def test_where_nothing_fits_it_is_said_what_would_help() -> None:
    helps = advice(2**20).binding.helps
    assert "--allow bf16: " in helps
    assert "--allow amp: " in helps


def test_a_plugin_takes_part_through_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Strategy):
        """Train on half of each batch."""

        name, stage, exact, changes = "half", Stage.STEP, False, "the data"

        @dataclass(frozen=True)
        class Config:
            """Nothing to set."""

        def apply(self, workload: Workload) -> None:
            whole = workload.split
            workload.split = lambda batch, parts: whole(batch[: len(batch) // 2], parts)

    from memscope import strategies
    from memscope.advisor import combinations

    everything: Callable[[], dict[str, Any]] = lambda: {**available, "half": Half}  # noqa: E731
    available = dict(strategies.available())
    monkeypatch.setattr(plan_module, "available", everything)
    monkeypatch.setattr(combinations, "available", everything)
    found = advise(
        build, budget=budgets()[2] + CONTEXT, device=DEVICE, strategies="optim:fused,ga:steps=1", allow=["half"]
    )
    assert "half" in found.strategies
