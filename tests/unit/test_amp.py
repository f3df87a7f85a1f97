"""Mixed precision: where autocast is active, when there is a gradient scaler, and which dtypes stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.amp import AMP
from memscope.testing import toy_workload
from memscope.workload.description import StepPlan, Workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step

LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast() -> torch.dtype | None:
    """The dtype of autocast here; None if it is not active."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


class Probe(nn.Module):
    """A linear layer that records autocast and dtypes in the forward and the backward pass."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False, dtype=dtype)
        self.active: dict[str, torch.dtype | None] = {}
        self.output: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.active["forward"] = autocast()
        y: Tensor = self.linear(x)
        self.output = y.dtype
        y.register_hook(lambda gradient: self.active.update(backward=autocast()))
        return y


def probe_workload(model: nn.Module | None = None, loss: Callable[[nn.Module, Any], Tensor] | None = None) -> Workload:
    def mean_square(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        assert isinstance(model, Probe)
        model.active["loss"] = autocast()
        result: Tensor = y.float().square().mean()
        return result

    torch.manual_seed(0)
    return Workload(model or Probe(), [torch.randn(8, 4)], loss or mean_square, lambda p: torch.optim.SGD(p, lr=1.0))


def started(workload: Workload, plan: str) -> Training:
    Plan.parse(plan).apply(workload)
    return Training.start(workload, "cpu", lambda data: data)


def step(training: Training) -> Tensor:
    return run_step(training, micro_batches(training.workload, training.workload.batches[0]))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_autocast_is_active_only_in_forward_and_loss(dtype: str, micro_batches: int) -> None:
    model = Probe()
    training = started(probe_workload(model), f"amp:dtype={dtype},ga:steps={micro_batches}")
    optimizer: list[torch.dtype | None] = []
    training.optimizer.register_step_pre_hook(lambda *_: optimizer.append(autocast()))
    step(training)
    assert model.active == {"forward": LOW[dtype], "loss": LOW[dtype], "backward": None}
    assert optimizer == [None]


def test_without_the_strategy_autocast_is_not_active() -> None:
    model = Probe()
    step(started(probe_workload(model), ""))
    assert model.active == {"forward": None, "loss": None, "backward": None}
    assert model.output == torch.float32


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_linear_layer_computes_in_low_precision_while_weights_and_gradients_keep_theirs(dtype: str) -> None:
    model = Probe()
    training = started(probe_workload(model), f"amp:dtype={dtype}")
    gradients: list[torch.dtype] = []
    model.linear.weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.dtype))
    step(training)
    assert model.output == LOW[dtype]
    assert model.linear.weight.dtype == torch.float32
    assert gradients == [torch.float32]


def test_only_float16_has_a_gradient_scaler() -> None:
    assert started(toy_workload(), "amp:dtype=fp16").scaler is not None
    assert started(toy_workload(), "amp:dtype=bf16").scaler is None
    assert started(toy_workload(), "").scaler is None


def test_the_rest_of_the_step_plan_is_kept() -> None:
    workload = probe_workload()
    workload.plan = StepPlan(micro_batches=4, clip_grad_norm=0.5)
    Plan.parse("amp").apply(workload)
    assert workload.plan == StepPlan(micro_batches=4, clip_grad_norm=0.5, autocast=torch.float16, grad_scaler=True)


def test_the_scaled_gradient_is_unscaled_before_it_is_used() -> None:
    # The loss is the weight itself: its gradient is 1, scaled 65536 (torch.amp.GradScaler starts with it). lr is 1.
    model = nn.Linear(1, 1, bias=False)
    training = started(probe_workload(model, lambda m, x: model.weight.sum()), "amp:dtype=fp16")
    scaled: list[float] = []
    model.weight.register_post_accumulate_grad_hook(lambda p: scaled.append(p.grad.item()))
    before = model.weight.item()
    loss = step(training)
    assert scaled == [65536.0]
    assert loss.item() == before
    assert model.weight.item() == pytest.approx(before - 1, abs=1e-6)


def test_a_step_whose_gradients_overflow_is_skipped() -> None:
    model = nn.Linear(1, 1, bias=False)
    training = started(probe_workload(model, lambda m, x: (model.weight * 3e38).sum()), "amp:dtype=fp16")
    before = model.weight.item()
    step(training)
    assert model.weight.item() == before
    assert training.scaler is not None
    assert training.scaler.get_scale() == 65536.0 / 2


def test_only_float16_provides_a_gradient_scaler() -> None:
    assert AMP(AMP.Config("fp16")).provides == {"autocast", "gradient scaler"}
    assert AMP(AMP.Config("bf16")).provides == AMP.provides == {"autocast"}


def test_candidates_are_the_precisions_that_the_workload_does_not_have() -> None:
    workload = probe_workload()
    assert AMP.candidates(workload) == [AMP.Config("bf16"), AMP.Config("fp16")]
    workload.plan = StepPlan(autocast=torch.bfloat16)
    assert AMP.candidates(workload) == [AMP.Config("fp16")]


def test_trained_float16_weights_are_refused_with_a_gradient_scaler() -> None:
    with pytest.raises(UsageError) as caught:
        Plan.parse("amp:dtype=fp16").apply(probe_workload(Probe(torch.float16)))
    assert str(caught.value) == (
        'the plan "amp" cannot be applied to "workload": amp: dtype=fp16 needs a gradient scaler, which cannot '
        "unscale float16 gradients on a GPU: keep the trained weights in float32, or use dtype=bf16"
    )


def test_float16_weights_without_scaled_gradients_are_accepted() -> None:
    workload = probe_workload(Probe(torch.float16))
    Plan.parse("amp:dtype=bf16").apply(workload)
    assert workload.plan.autocast is torch.bfloat16
    frozen = nn.Sequential(Probe(torch.float16).requires_grad_(False), nn.Linear(4, 4))
    Plan.parse("amp:dtype=fp16").apply(probe_workload(frozen))
