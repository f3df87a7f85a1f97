"""What the advisor reads of layers, on chains whose sizes are worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memscope import Workload, simulate
from memscope.advisor.measure.probe import ChainSeen, look
from memscope.errors import UsageError
from memscope.simulation.simulate import Part

pytestmark = pytest.mark.usefixtures("kept_workspaces")

ROWS, WIDTH = 64, 256
BOUNDARY = ROWS * WIDTH * 4  # float32 input of each layer: 64 KiB, a whole number of 512-byte blocks


class Layer(nn.Module):
    """`relu(linear(x))`: its graph keeps the input, for the weight's gradient, and the output, for relu's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Squared(nn.Module):
    """`linear(x) ** 2`: besides its input it keeps what the linear layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        return h * h


class Chain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def seen(model: nn.Module, strategies: str = "") -> ChainSeen:
    workload = Workload(
        model, [torch.ones(ROWS, WIDTH)], lambda m, x: m(x).sum(), lambda p: torch.optim.SGD(p, lr=0.1), name="chain"
    )
    names = [f"layers.{i}" for i in range(len(model.layers))]  # type: ignore[arg-type]
    trace = simulate(workload, strategies=strategies, part=Part(calls_of=names))
    return look(trace, [[name] for name in names], step=1, micro_batch=0)


def test_a_boundary_is_neither_layer_s_own() -> None:
    chain = seen(Chain(Layer(), Layer(), Layer()))
    assert [layer.input_bytes for layer in chain.layers] == [BOUNDARY] * 3
    assert chain.output_bytes == BOUNDARY
    assert [layer.kept_bytes for layer in chain.layers] == [0, 0, 0]  # relu keeps its result, which is the boundary
    assert [layer.keeps_input for layer in chain.layers] == [True, True, True]


def test_what_a_layer_makes_and_keeps_is_its_own() -> None:
    chain = seen(Chain(Squared(), Squared()))
    assert [layer.kept_bytes for layer in chain.layers] == [BOUNDARY, BOUNDARY]  # the linear layer's result


def test_a_checkpointed_layer_keeps_its_input_alone() -> None:
    chain = seen(Chain(Squared(), Squared(), Squared()), "ckpt")
    assert [(layer.kept_bytes, layer.keeps_input) for layer in chain.layers] == [(0, True)] * 3


def test_forward_rises_by_what_is_made_at_once() -> None:
    chain = seen(Chain(Squared(), Squared(), Squared()))
    # the linear layer's result, and the product
    assert chain.layers[1].forward_rise_bytes == 2 * BOUNDARY


def test_backward_rises_by_what_was_kept_and_what_is_made() -> None:
    middle = seen(Chain(Squared(), Squared(), Squared())).layers[1]
    weight = WIDTH * WIDTH * 4
    # Most is there when the linear layer has both its gradients: its input, the gradient of its result, the weight's
    # and the input's gradient. The gradient that came in, part of the base, is gone by then, as is the kept result.
    assert middle.backward_rise_bytes == BOUNDARY + BOUNDARY + weight + BOUNDARY - BOUNDARY


def test_equal_layers_have_equal_signatures_and_others_do_not() -> None:
    first, second, third = seen(Chain(Layer(), Layer(), Squared())).layers
    assert first.signature == second.signature != third.signature


def test_layers_out_of_order_are_refused_in_words() -> None:
    class Backwards(Chain):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    with pytest.raises(UsageError, match="form no chain: in one forward pass they are called in another order"):
        seen(Backwards(Layer(), Layer()))


def test_a_layer_called_twice_is_refused_in_words() -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](self.layers[0](x)))  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match=r'"layers\.0" is called 2 times'):
        seen(Twice(Layer(), Layer()))
