"""Gradient accumulation: the same step in micro-batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.ga import GradientAccumulation
from memscope.testing import toy_workload
from memscope.workload.description import StepPlan, Workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step

IGNORED = -100


def toy(plan: str = "", *, masked: tuple[int, ...] = ()) -> Workload:
    """The toy in float64; the samples in `masked` have no target token."""
    torch.manual_seed(0)
    workload = toy_workload()
    workload.model.double()

    def labels(tokens: Tensor) -> Tensor:
        sample = (tokens != IGNORED).sum(1) - 4  # sample i has 4 + i tokens
        return tokens[:, 1:].masked_fill(torch.isin(sample, torch.tensor(masked))[:, None], IGNORED)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens.clamp(min=0))[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels(tokens).flatten(), ignore_index=IGNORED)

    workload.loss = loss
    workload.weight = lambda tokens: float((labels(tokens) != IGNORED).sum())
    Plan.parse(plan).apply(workload)
    return workload


def assert_exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def step(workload: Workload) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        named = workload.model.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    training = Training.start(workload, "cpu", lambda data: data)
    training.optimizer.register_step_pre_hook(keep)
    return run_step(training, micro_batches(workload, workload.batches[0])), gradients


def test_the_samples_differ_in_their_number_of_targets() -> None:
    # Samples have 4 to 11 tokens, each but the first one a target: 3 + 4 + … + 10 = 52.
    pieces = micro_batches(toy("ga:steps=8"), toy().batches[0])
    assert [piece.share * 52 for piece in pieces] == pytest.approx([3, 4, 5, 6, 7, 8, 9, 10])


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_loss_and_gradients_are_those_of_the_batch_in_one_go(steps: int) -> None:
    loss, gradients = step(toy(f"ga:steps={steps}"))
    expected_loss, expected = step(toy())
    assert_exact(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_exact(gradient, expected[name])
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.01


def test_a_mean_over_micro_batches_would_differ() -> None:
    workload = toy("ga:steps=8")
    workload.weight = lambda batch: 1.0
    _, gradients = step(workload)
    _, expected = step(toy())
    assert max(float((gradients[name] - expected[name]).abs().max()) for name in expected) > 1e-3


@pytest.mark.parametrize("masked", [(0,), (2, 3), (0, 4, 7)])
def test_a_micro_batch_without_any_target_adds_nothing(masked: tuple[int, ...]) -> None:
    loss, gradients = step(toy("ga:steps=8", masked=masked))
    expected_loss, expected = step(toy(masked=masked))
    assert_exact(loss, expected_loss)
    for name, gradient in gradients.items():
        assert_exact(gradient, expected[name])


def test_the_effective_batch_is_unchanged() -> None:
    workload = toy("ga:steps=4")
    pieces = micro_batches(workload, workload.batches[0])
    assert [piece.data.shape for piece in pieces] == [(2, 5), (2, 7), (2, 9), (2, 11)]  # padded to the longer of two
    assert sum(piece.share for piece in pieces) == pytest.approx(1)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("3", "steps=3: a step's batch of 8 samples cannot be split into 3 equal micro-batches: "
              "choose a number of micro-batches that divides 8"),
        ("16", "steps=16: a step's batch of 8 samples cannot be split into 16 equal micro-batches: "
               "choose a number of micro-batches that divides 8"),
        ("0", "steps=0 is not a number of micro-batches: choose at least 1"),
        ("-2", "steps=-2 is not a number of micro-batches: choose at least 1"),
    ],
)  # fmt: skip
def test_an_impossible_number_of_micro_batches_is_refused(steps: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        toy(f"ga:steps={steps}")
    assert str(caught.value) == f'the plan "ga:steps={steps}" cannot be applied to "toy": ga: {problem}'


def test_only_the_number_of_micro_batches_changes() -> None:
    workload = toy()
    workload.plan = StepPlan(micro_batches=2, clip_grad_norm=1.0)
    Plan.parse("ga:steps=4").apply(workload)
    assert workload.plan == StepPlan(micro_batches=4, clip_grad_norm=1.0)


def test_the_baseline_is_the_same_batch_in_one_go() -> None:
    workload = toy()
    workload.plan = StepPlan(micro_batches=4, clip_grad_norm=1.0)
    GradientAccumulation().baseline(workload)
    assert workload.plan == StepPlan(micro_batches=1, clip_grad_norm=1.0)
    (piece,) = micro_batches(workload, workload.batches[0])
    assert piece.share == 1.0
    assert piece.data.shape == (8, 11)


def test_a_workload_without_a_batch_is_no_problem_of_the_strategy() -> None:
    workload = toy()
    workload.batches = []
    assert GradientAccumulation().check(workload) == []


@pytest.mark.parametrize(("micro_batches", "candidates"), [(1, [2, 4, 8]), (2, [1, 4, 8]), (8, [1, 2, 4])])
def test_candidates_are_the_other_numbers_that_the_samples_divide_into(
    micro_batches: int, candidates: list[int]
) -> None:
    workload = toy()  # 8 samples
    workload.plan = StepPlan(micro_batches=micro_batches)
    assert [config.steps for config in GradientAccumulation.candidates(workload)] == candidates


def test_at_most_256_micro_batches_are_candidates_and_the_others_are_left_out() -> None:
    workload = toy()
    workload.batches = [torch.zeros(2**20)]
    assert [config.steps for config in GradientAccumulation.candidates(workload)] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert [config.steps for config in GradientAccumulation.left_out(workload)] == [2**power for power in range(9, 21)]
    workload.batches = [torch.zeros(3 * 2**20)]
    assert 192 in [config.steps for config in GradientAccumulation.candidates(workload)]
    assert GradientAccumulation.left_out(toy()) == []


@pytest.mark.parametrize(
    ("batch", "candidates"),
    [
        ({"x": torch.ones(12, 3), "y": torch.ones(12)}, [2, 3, 4, 6, 12]),
        (torch.tensor(1.0), []),
        (object(), []),
    ],
)
def test_samples_are_counted_in_tensors_of_any_batch(batch: object, candidates: list[int]) -> None:
    workload = Workload(nn.Linear(3, 1), [batch], lambda m, x: m(x).sum(), torch.optim.SGD)
    assert [config.steps for config in GradientAccumulation.candidates(workload)] == candidates


def test_without_a_batch_there_is_no_candidate() -> None:
    workload = toy()
    workload.batches = []
    assert GradientAccumulation.candidates(workload) == []
