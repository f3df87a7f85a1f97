"""Random small models: a simulation on `cpu` is the same list of allocations as the run it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memscope import StepPlan, Workload, record, simulate
from memscope.testing.conformance import _allocations


@dataclass(frozen=True)
class Layer:
    """One layer, `[rows, tokens, width]` to the same shape."""

    kind: str
    wrapped: str = "plain"
    """plain, residual, or how its activations are recomputed."""


@dataclass(frozen=True)
class Drawn:
    """A model and how it is trained."""

    layers: tuple[Layer, ...]
    width: int = 8
    tokens: int = 3
    rows: int = 2
    """Samples of a micro-batch."""
    micro_batches: int = 1
    optimizer: str = "AdamW"
    ties_first_and_last: bool = False


def changed_in_place(layer: nn.Linear, x: Tensor) -> Tensor:
    # Not the result of the layer itself, which is a view: docs/accuracy.md says what a simulation lacks there.
    y: Tensor = layer(x).sin()
    y += 1
    return y.mul_(0.5)


def halves_swapped(layer: nn.Linear, x: Tensor) -> Tensor:
    one, two = layer(x).chunk(2, dim=-1)
    return torch.cat([two, one], dim=-1)


def across_tokens(layer: nn.Linear, x: Tensor) -> Tensor:
    y = layer(x).transpose(1, 2)
    y = y.reshape(-1, x.shape[1])  # a copy: the transposed tensor is not contiguous
    return y.view(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)


def attention(layer: nn.Linear, x: Tensor) -> Tensor:
    y = layer(x)
    scores = y @ y.transpose(1, 2)
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -1e9).softmax(-1) @ y


def windows(layer: nn.Linear, x: Tensor) -> Tensor:
    y = layer(x).clone()
    y[:, 0] = y[:, 0].detach() + 1
    return torch.stack([y.select(1, i) for i in range(x.shape[1])], dim=1)


WITH_WEIGHTS = {
    "linear": lambda layer, x: layer(x),
    "changed_in_place": changed_in_place,
    "halves_swapped": halves_swapped,
    "across_tokens": across_tokens,
    "attention": attention,
    "windows": windows,
    "used_twice": lambda layer, x: layer(layer(x)),
    "fused_attention": lambda layer, x: F.scaled_dot_product_attention(layer(x), x, x),
    "transposed_weight": lambda layer, x: x @ layer.weight + layer.bias,
}
WITHOUT = {
    "relu": nn.ReLU,
    "relu_in_place": lambda: nn.Sequential(nn.Identity(), _Added(), nn.ReLU(inplace=True)),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "softmax": lambda: nn.Softmax(-1),
    "dropout": lambda: nn.Dropout(0.25),
    "sorted": lambda: _Sorted(),
}


class _Added(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class _Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values.cumsum(-1) + x.amax(-1, keepdim=True).expand_as(x)


class _Weighted(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return WITH_WEIGHTS[self.kind](self.layer, x)


def made(kind: str, width: int) -> nn.Module:
    if kind in WITH_WEIGHTS:
        return _Weighted(kind, width)
    if kind == "norm":
        return nn.LayerNorm(width)
    return WITHOUT[kind]()


class Model(nn.Module):
    """The layers of a draw, between two linear layers."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn
        self.first, self.last = nn.Linear(drawn.width, drawn.width), nn.Linear(drawn.width, drawn.width)
        self.layers = nn.ModuleList(made(layer.kind, drawn.width) for layer in drawn.layers)
        if drawn.ties_first_and_last:
            self.last.weight = self.first.weight
        self.register_buffer("shift", torch.zeros(drawn.width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for how, layer in zip(self.drawn.layers, self.layers, strict=True):
            if how.wrapped == "residual":
                x = x + layer(x)
            elif how.wrapped == "plain":
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=how.wrapped == "reentrant")
        return self.last(x + self.shift)


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AMSGrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True),
}

layers = st.builds(
    Layer,
    kind=st.sampled_from([*WITH_WEIGHTS, *WITHOUT, "norm"]),
    wrapped=st.sampled_from(["plain", "plain", "residual", "checkpoint", "reentrant"]),
)
models = st.builds(
    Drawn,
    layers=st.lists(layers, min_size=1, max_size=6).map(tuple),
    width=st.sampled_from([4, 8]),
    tokens=st.integers(1, 5),
    rows=st.integers(1, 4),
    micro_batches=st.integers(1, 3),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    ties_first_and_last=st.booleans(),
)


def of_every_kind(wrapped: str) -> Drawn:
    kinds = [*WITH_WEIGHTS, *WITHOUT, "norm"]
    return Drawn(tuple(Layer(kind, wrapped) for kind in kinds), micro_batches=2, ties_first_and_last=True)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(models)
@example(of_every_kind("plain"))
@example(of_every_kind("checkpoint"))
@example(of_every_kind("reentrant"))
def test_a_simulation_of_a_random_model_equals_its_run(drawn: Drawn) -> None:
    def build() -> Workload:
        torch.manual_seed(0)
        return Workload(
            Model(drawn),
            [torch.ones(drawn.rows * drawn.micro_batches, drawn.tokens, drawn.width)],
            lambda model, x: model(x).square().mean(),
            OPTIMIZERS[drawn.optimizer],
            StepPlan(micro_batches=drawn.micro_batches),
            name="generated",
        )

    simulated, run = simulate(build, device="cpu"), record(build)
    assert _allocations(simulated) == _allocations(run)
