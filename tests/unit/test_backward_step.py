"""The optimizer inside the backward pass: the same updates, and gradients that die at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memscope import simulate
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.backward_step import BackwardStep
from memscope.testing import toy_workload
from memscope.trace import PHASES
from memscope.workload.description import Workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step

DIM = 64
WEIGHT = DIM * DIM * 4


def build(optimizer: Any = torch.optim.AdamW) -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(DIM, DIM, bias=False) for _ in range(3)])
    return Workload(model, [torch.randn(8, DIM)], lambda model, x: model(x).square().mean(), optimizer)


def trained(plan: str, workload: Workload, steps: int = 3) -> tuple[Training, list[Tensor]]:
    """The weights after some steps, between which the learning rate of every group is halved."""
    Plan.parse(plan).apply(workload)
    training = Training.start(workload, "cpu", lambda data: data)
    for _ in range(steps):
        run_step(training, micro_batches(workload, workload.batches[0]))
        for group in training.optimizer.param_groups:
            group["lr"] /= 2
    return training, [parameter.detach().clone() for parameter in workload.model.parameters()]


def test_only_one_gradient_is_alive_at_a_time_and_the_work_is_the_optimizers() -> None:
    usual, trace = (simulate(build, device="gpu", strategies=plan) for plan in ("", "backward-step"))
    assert usual.max_by_category(1)["gradient"] == 3 * WEIGHT
    assert trace.max_by_category(1)["gradient"] == WEIGHT
    assert trace.max_by_category(1)["optimizer_state"] == usual.max_by_category(1)["optimizer_state"]
    phases = [PHASES[code] for code in trace.mark_phase[trace.mark_step == 1]]
    assert phases == ["forward", "loss", *["backward", "optimizer"] * 3, "backward", "zero_grad"]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_the_updates_and_the_state_are_those_of_the_usual_step(optimizer: Any) -> None:
    (usual, expected), (training, found) = (trained(plan, build(optimizer)) for plan in ("", "backward-step"))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    states = [one.optimizer.state_dict()["state"] for one in (usual, training)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])


class Counting(torch.optim.Optimizer):
    """Counts its steps in the group, as schedule-free optimizers do, and moves weights by the count."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {"lr": 1.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                parameter.add_(group["k"])


def test_what_an_optimizer_counts_in_a_group_is_counted_once_a_step() -> None:
    before = list(build().model.parameters())
    _, after = trained("backward-step", build(Counting), steps=2)
    assert all(torch.equal(old + 1 + 2, new) for old, new in zip(before, after, strict=True))
    assert not BackwardStep().is_exact(build(Counting))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batches": 4}, "the gradients of 4 micro-batches accumulate"),
        ({"clip_grad_norm": 1.0}, "the gradients are clipped to a total norm of 1.0"),
        ({"grad_scaler": True}, "a GradScaler looks at all gradients"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(change: dict[str, Any], message: str) -> None:
    workload = toy_workload()
    workload.plan = replace(workload.plan, **change)
    with pytest.raises(UsageError, match=message):
        Plan.parse("backward-step").apply(workload)
    workload.plan = replace(workload.plan, step_in_backward=True)  # as by a strategy that is applied later
    with pytest.raises(UsageError, match=f"cannot update parameters in the backward pass: {message}"):
        Training.start(workload, "cpu", lambda data: data)


@pytest.mark.parametrize("plan", ["backward-step,ga", "backward-step,amp", "backward-step,offload:optimizer"])
def test_strategies_that_need_all_gradients_at_once_conflict(plan: str) -> None:
    with pytest.raises(UsageError, match="cannot be combined"):
        Plan.parse(plan)


def test_an_optimizer_that_updates_all_parameters_at_once_is_refused() -> None:
    with pytest.raises(UsageError, match="LBFGS updates all parameters at once"):
        Plan.parse("backward-step").apply(build(torch.optim.LBFGS))
