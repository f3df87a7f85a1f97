"""Implementations of the optimizer's step: the changed optimizer, and the temporaries that each one takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memscope import simulate
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.optim import Optim
from memscope.testing import toy_workload
from memscope.trace import PHASES, Trace
from memscope.workload.description import Workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step

PLANS = ("optim", "optim:foreach=false", "optim:fused")
FLAGS = {
    "optim": {"fused": False, "foreach": True},
    "optim:foreach=false": {"fused": False, "foreach": False},
    "optim:fused": {"fused": True, "foreach": False},
}
Factory = Callable[[Iterable[nn.Parameter]], Optimizer]


def workload_with(factory: Factory) -> Workload:
    torch.manual_seed(0)
    workload = toy_workload()
    workload.optimizer_factory = factory
    return workload


def started(workload: Workload, plan: str) -> Training:
    Plan.parse(plan).apply(workload)
    return Training.start(workload, "cpu", lambda data: data)


def step(training: Training) -> Tensor:
    return run_step(training, micro_batches(training.workload, training.workload.batches[0]))


def refusal(factory: Factory, plan: str) -> str:
    with pytest.raises(UsageError) as caught:
        Plan.parse(plan).apply(workload_with(factory))
    return str(caught.value).partition("optim: ")[2]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["AdamW", "Adam", "Adagrad", "SGD"])
def test_the_flags_reach_every_parameter_group_and_the_rest_stays(name: str, plan: str) -> None:
    def two_groups(parameters: Iterable[nn.Parameter]) -> Optimizer:
        first, *others = parameters
        optimizer: Optimizer = getattr(torch.optim, name)(
            [{"params": [first], "lr": 0.5, "layer": "first"}, {"params": others}], lr=0.25, weight_decay=0.125
        )
        return optimizer

    workload = workload_with(two_groups)
    before = two_groups(workload.model.parameters())
    after = started(workload, plan).optimizer
    assert type(after) is type(before)
    expected = [group | FLAGS[plan] for group in before.param_groups]
    assert [{**group, "params": None} for group in after.param_groups] == [{**g, "params": None} for g in expected]
    assert after.defaults == before.defaults | FLAGS[plan]
    for group, same in zip(after.param_groups, before.param_groups, strict=True):
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in same["params"]]


@pytest.mark.parametrize(
    "name", ["NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "Rprop", "ASGD", "AdamW", "Adam", "Adagrad", "SGD"]
)
def test_every_pytorch_optimizer_with_a_foreach_implementation_also_works_without_it(name: str) -> None:
    kind = getattr(torch.optim, name)
    training = started(workload_with(kind), "optim:foreach=false")
    assert [group["foreach"] for group in training.optimizer.param_groups] == [False]
    step(training)


@pytest.mark.parametrize("plan", PLANS)
def test_after_three_steps_the_weights_differ_only_in_rounding(plan: str) -> None:
    def weights(plan: str) -> list[Tensor]:
        workload = workload_with(lambda p: torch.optim.AdamW(p, lr=0.01))
        workload.model.double()
        training = started(workload, plan)
        for _ in range(3):
            step(training)
        return [parameter.detach() for parameter in workload.model.parameters()]

    for one, other in zip(weights(plan), weights(""), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)  # after moving by 0.03; rounding is 2e-16 per step


def test_optimizer_state_loaded_by_the_factory_is_kept() -> None:
    trained = started(workload_with(torch.optim.AdamW), "")
    step(trained)
    saved = trained.optimizer.state_dict()

    def resumed(parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = torch.optim.AdamW(parameters)
        optimizer.load_state_dict(saved)
        return optimizer

    optimizer = started(workload_with(resumed), "optim:fused").optimizer
    assert optimizer.param_groups[0]["fused"] is True
    for index, state in enumerate(optimizer.state.values()):
        assert {key: value.tolist() for key, value in state.items()} == {
            key: value.tolist() for key, value in saved["state"][index].items()
        }


def test_a_fused_step_whose_gradients_overflow_is_skipped() -> None:
    # The kernel receives the scale and whether a gradient overflowed; an infinite loss gives infinite gradients.
    model = nn.Linear(1, 1, bias=False)
    workload = Workload(model, [torch.ones(2, 1)], lambda m, x: (model.weight * 3e38).sum(), torch.optim.AdamW)
    training = started(workload, "optim:fused,amp:dtype=fp16")
    before = model.weight.item()
    step(training)
    assert model.weight.item() == before
    assert training.optimizer.state[model.weight]["step"].item() == 0
    assert training.scaler is not None
    assert training.scaler.get_scale() == 65536.0 / 2  # torch.amp.GradScaler starts with 65536 and halves it


def test_a_fused_step_unscales_the_gradients() -> None:
    # Adam's first step moves by lr against the sign of the gradient, whatever its size; SGD's shows the size itself.
    model = nn.Linear(1, 1, bias=False)
    workload = Workload(model, [torch.ones(2, 1)], lambda m, x: model.weight.sum(), lambda p: torch.optim.SGD(p, lr=1))
    training = started(workload, "optim:fused,amp:dtype=fp16")
    before = model.weight.item()
    step(training)
    assert model.weight.item() == pytest.approx(before - 1, abs=1e-6)


class Warm(torch.optim.AdamW):
    """An optimizer that does not pass on an argument of its constructor."""

    def __init__(self, params: Any, warmup: int = 10, fused: bool | None = None, foreach: bool | None = None) -> None:
        super().__init__(params, fused=fused, foreach=foreach)
        self.warmup = warmup


@pytest.mark.parametrize(
    ("factory", "plan", "message"),
    [
        (torch.optim.NAdam, "optim:fused",
         'the optimizer NAdam has no "fused" argument: choose foreach=false, or train with an optimizer that has '
         '"fused", such as torch.optim.AdamW'),
        (torch.optim.LBFGS, "optim:fused",
         'the optimizer LBFGS has no "fused" argument: remove this strategy, or train with an optimizer that has '
         '"fused", such as torch.optim.AdamW'),
        (torch.optim.SparseAdam, "optim:foreach=false",
         'the optimizer SparseAdam has no "foreach" argument: remove this strategy, or train with an optimizer that '
         'has "foreach", such as torch.optim.AdamW'),
        (Warm, "optim:fused",
         'the optimizer Warm cannot be rebuilt: its defaults do not contain "warmup": remove this strategy and pass '
         "fused to the optimizer where it is built"),
        (lambda p: torch.optim.Adam(p, differentiable=True), "optim:fused",
         "the optimizer Adam rejects fused: `fused` does not support `differentiable`: choose foreach=false, or "
         'train with an optimizer that has "fused", such as torch.optim.AdamW'),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)), "optim",
         "the optimizer AdamW rejects foreach: lr as a Tensor is not supported for capturable=False and foreach=True: "
         'remove this strategy, or train with an optimizer that has "foreach", such as torch.optim.AdamW'),
    ],
    ids=["NAdam", "LBFGS", "SparseAdam", "an argument is lost", "differentiable", "lr is a tensor"],
)  # fmt: skip
def test_an_optimizer_without_the_implementation_is_refused_with_the_reason(
    factory: Factory, plan: str, message: str
) -> None:
    assert refusal(factory, plan) == message


def test_an_optimizer_that_cannot_be_built_is_no_problem_of_the_strategy() -> None:
    def broken(parameters: Iterable[nn.Parameter]) -> Optimizer:
        raise RuntimeError("no optimizer today")

    workload = workload_with(broken)
    assert Optim().check(workload) == []
    assert Optim.candidates(workload) == []
    workload.model.requires_grad_(False)
    assert Optim().check(workload) == []


FUSED, ONE_BY_ONE = Optim.Config(fused=True), Optim.Config(foreach=False)


@pytest.mark.parametrize(
    ("flags", "candidates"),
    [
        ({}, [FUSED, ONE_BY_ONE]),
        ({"foreach": True}, [FUSED, ONE_BY_ONE]),
        ({"fused": True}, [ONE_BY_ONE]),
        ({"foreach": False}, [FUSED]),
        ({"fused": False}, [FUSED]),  # PyTorch chooses foreach only if neither flag is given
    ],
)
def test_candidates_are_the_implementations_that_the_optimizer_does_not_use_yet(
    flags: dict[str, Any], candidates: list[Any]
) -> None:
    found = Optim.candidates(workload_with(lambda p: torch.optim.AdamW(p, **flags)))
    assert [config for config in found if config.name is None] == candidates


LAYERS = 5
WEIGHT = 4 * 128 * 128  # bytes of each of the layers' weights: whole blocks of 512 on a GPU


def simulated_on_a_gpu(plan: str, factory: Factory = torch.optim.AdamW) -> Trace:
    def build() -> Workload:
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(LAYERS)))
        return Workload(model, [torch.ones(1, 128)], lambda m, x: m(x).sum(), factory)

    return simulate(build, strategies=plan)


def temporaries(trace: Trace) -> list[tuple[int, int, int]]:
    """`(born, freed, bytes)` of the optimizer's allocations in the second step, in which its state already exists."""
    chosen = (trace.step == 1) & (trace.phase == PHASES.index("optimizer"))
    rows = zip(trace.born[chosen].tolist(), trace.freed[chosen].tolist(), trace.size[chosen].tolist(), strict=True)
    return list(rows)


def most_at_once(trace: Trace) -> int:
    taken = temporaries(trace)
    return max((sum(size for born, freed, size in taken if born <= now < freed) for now, _, _ in taken), default=0)


def test_foreach_takes_a_temporary_as_large_as_all_parameters() -> None:
    # The roots of all second moments at once (`_multi_tensor_adam`, torch/optim/adam.py, 2.13).
    assert most_at_once(simulated_on_a_gpu("optim")) == LAYERS * WEIGHT
    assert most_at_once(simulated_on_a_gpu("")) == LAYERS * WEIGHT  # PyTorch's own choice on a GPU


def test_one_by_one_takes_the_temporaries_of_one_parameter() -> None:
    # `denom = (exp_avg_sq.sqrt() / bias_correction2_sqrt).add_(eps)`: the root and the quotient, while `denom` still
    # refers to the previous one (`_single_tensor_adam`, torch/optim/adam.py, 2.13).
    assert most_at_once(simulated_on_a_gpu("optim:foreach=false")) == 3 * WEIGHT


def test_fused_takes_no_temporary_and_keeps_a_counter_for_each_parameter_on_the_device() -> None:
    trace = simulated_on_a_gpu("optim:fused")
    assert temporaries(trace) == []
    two_moments = 2 * LAYERS * WEIGHT
    assert trace.max_by_category(1)["optimizer_state"] == two_moments + LAYERS * 512  # 4 bytes in a block of 512
    for plan in ("optim", "optim:foreach=false"):
        assert simulated_on_a_gpu(plan).max_by_category(1)["optimizer_state"] == two_moments


def test_fused_with_a_gradient_scaler_takes_only_scalars() -> None:
    # A factor of 1, the overflow flag, a copy of each for the device, the sum over devices, the scale
    # (`step`, `_check_inf_per_device` and `_MultiDeviceReplicator.get`, torch/amp/grad_scaler.py, 2.13).
    assert [size for _, _, size in temporaries(simulated_on_a_gpu("optim:fused,amp:dtype=fp16"))] == [512] * 6


@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": False}, {}])
def test_the_workloads_own_flags_have_the_effect_of_the_strategy(flags: dict[str, Any]) -> None:
    plan = {(): "optim", ("fused",): "optim:fused", ("foreach",): "optim:foreach=false"}[tuple(flags)]
    own = simulated_on_a_gpu("", lambda p: torch.optim.AdamW(p, **flags))
    assert own.size.tolist() == simulated_on_a_gpu(plan).size.tolist()
