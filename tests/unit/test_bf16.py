"""Pure bfloat16: the tensors that are converted, and those that keep their precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope import record, simulate
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.bf16 import BF16
from memscope.testing import toy_workload
from memscope.workload.description import Workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step
from memscope.workload.target import find_target

LOW = torch.bfloat16


class Model(nn.Module):
    """A linear layer with a buffer of each kind; records its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.register_buffer("rotations", torch.ones(4, dtype=torch.complex64))
        self.register_buffer("positions", torch.arange(4))
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, *, scale: Tensor, chosen: Tensor) -> Tensor:
        self.seen = {"x": x.dtype, "scale": scale.dtype, "chosen": chosen.dtype}
        y: Tensor = self.linear(x * scale)[:, chosen] + self.get_buffer("table")
        return y


def workload(plan: str = "bf16") -> Workload:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        y = model(batch["x"], scale=batch["x"].new_full((), 2.0), chosen=torch.arange(4))
        assert y.dtype is LOW
        assert batch["target"].dtype is torch.float32
        return F.mse_loss(y.float(), batch["target"])  # PyTorch 2.11's kernel takes only one precision

    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 4), "target": torch.randn(8, 4)}
    found = Workload(Model(), [batch], loss, torch.optim.AdamW)
    Plan.parse(plan).apply(found)
    return found


def step(workload: Workload) -> tuple[Training, dict[str, torch.dtype]]:
    """The training after one step, and the dtype of each gradient."""
    gradients: dict[str, torch.dtype] = {}
    for name, parameter in workload.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.dtype}))
    training = Training.start(workload, "cpu", lambda data: data)
    run_step(training, micro_batches(workload, workload.batches[0]))
    return training, gradients


def test_weights_and_floating_point_buffers_are_converted_and_others_stay() -> None:
    model = workload().model
    assert {parameter.dtype for parameter in model.parameters()} == {LOW}
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == {
        "table": LOW, "rotations": torch.complex64, "positions": torch.int64,
    }  # fmt: skip


def test_gradients_and_optimizer_state_follow() -> None:
    training, gradients = step(workload())
    assert gradients == {"linear.weight": LOW, "linear.bias": LOW}
    moments = {
        value.dtype for state in training.optimizer.state.values() for key, value in state.items() if key != "step"
    }
    assert moments == {LOW}


def test_the_models_input_is_converted_and_the_labels_are_not() -> None:
    found = workload()
    step(found)  # whose loss reads the labels
    assert found.model.seen == {"x": LOW, "scale": LOW, "chosen": torch.int64}


def test_shared_weights_stay_shared() -> None:
    toy = toy_workload()
    head, embed = toy.model.get_submodule("head"), toy.model.get_submodule("embed")
    head.weight = embed.weight
    Plan.parse("bf16").apply(toy)
    assert head.weight is embed.weight
    assert head.weight.dtype is LOW


def test_adapters_have_the_precision_of_the_weights() -> None:
    toy = toy_workload()
    Plan.parse("lora:r=2,bf16").apply(toy)
    assert {p.dtype for p in toy.model.parameters() if p.requires_grad} == {LOW}


def test_every_category_of_a_layer_is_half_as_large() -> None:
    # A linear layer of 256 x 256 without a bias, 4 bytes an element in float32; Adam has two moments.
    def build() -> Workload:
        return Workload(
            nn.Linear(256, 256, bias=False), [torch.ones(2, 256)], lambda m, x: m(x).sum(), torch.optim.AdamW
        )

    for plan, element in (("", 4), ("bf16", 2)):
        largest = simulate(build, strategies=plan).max_by_category(1)
        weight = element * 256 * 256
        assert largest["parameter"] == largest["gradient"] == weight
        assert largest["optimizer_state"] == 2 * weight
        assert largest["weight_copy"] == 0


@pytest.mark.parametrize("plan", ["bf16", "bf16,amp:dtype=bf16", "bf16,lora:r=2,optim:fused"])
def test_simulated_and_real_runs_make_the_same_allocations(plan: str) -> None:
    simulated, real = simulate(toy_workload, device="cpu", strategies=plan), record(toy_workload, strategies=plan)
    assert simulated.requested.tolist() == real.requested.tolist()
    assert simulated.category.tolist() == real.category.tolist()


def test_llama2_converted_takes_the_memory_of_llama2_built_in_bfloat16() -> None:
    target = find_target("llama2")
    sizes = {"n_layers": "2", "dim": "48", "accumulation": "2", "seq_len": "48"}
    low, high = (target.configure("debug", {**sizes, "dtype": dtype}) for dtype in ("bf16", "fp32"))
    built = simulate(lambda: target.build(low))
    converted = simulate(lambda: target.build(high), strategies="bf16")
    assert converted.size.tolist() == built.size.tolist()
    assert converted.category.tolist() == built.category.tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama2_converted_computes_what_llama2_built_in_bfloat16_computes(attention: str) -> None:
    target = find_target("llama2")
    settings = {"n_layers": "2", "dim": "48", "samples": "8", "attention": attention}
    low, high = (target.build(target.configure("debug", {**settings, "dtype": dtype})) for dtype in ("bf16", "fp32"))
    rotations = high.model.get_buffer("freqs_cis").clone()
    Plan.parse("bf16").apply(high)
    # Complex numbers have no counterpart in bfloat16: they are kept, and the rotation is computed in float32.
    assert high.model.get_buffer("freqs_cis").dtype is torch.complex64
    assert torch.equal(high.model.get_buffer("freqs_cis"), rotations)
    low.model.load_state_dict(high.model.state_dict())
    tokens = torch.arange(100)[None]
    assert torch.equal(high.model(tokens), low.model(tokens))


def test_a_model_already_in_bfloat16_is_refused() -> None:
    toy = toy_workload()
    toy.model.bfloat16()
    (problem,) = BF16().check(toy)
    assert str(problem) == "all floating-point weights of the model are already in bfloat16: remove this strategy"


def test_a_gradient_scaler_is_refused_and_autocast_without_one_is_not() -> None:
    with pytest.raises(UsageError) as caught:
        Plan.parse("bf16,amp:dtype=fp16")
    assert str(caught.value) == (
        'the plan cannot be used: "bf16" and "amp" cannot be combined, because of "gradient scaler": '
        "remove one, or change the setting that adds it"
    )
    assert Plan.parse("bf16,amp:dtype=bf16").specs == ["bf16", "amp:dtype=bf16"]
