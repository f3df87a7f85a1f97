"""Checkpoint plans on a GPU: gradients are identical, and offloading frees the bytes it promises."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from memscope.strategies.ckpt import Checkpoint, LayerPlan
from memscope.workload.description import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch finds none"),
]
DIM, ROWS = 512, 1024
U = DIM * ROWS * 4
"""Bytes of a layer's input or output, in float32: whole MiB, so that the allocator rounds nothing."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(4 * DIM, DIM, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, *, x: Tensor) -> Tensor:
        y = self.dropout(torch.relu(self.up(x)))
        return x + self.dropout(self.down(y))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x=x)
        return x


def run(options: list[str]) -> tuple[dict[str, Tensor], int]:
    """Gradients after a step, and bytes held between forward and backward beyond weights and batch."""
    gc.collect()
    torch.manual_seed(0)
    model = Model().cuda()
    layers = LayerPlan({f"layers.{index}": option for index, option in enumerate(options)})
    Checkpoint.of(layers).apply(Workload(model, [], lambda model, x: model(x), torch.optim.SGD))
    x = torch.randn(ROWS, DIM, device="cuda")
    torch.mm(x, x.T)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    loss = model(x).sum()
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, held


@pytest.mark.parametrize(
    "options",
    [
        ["full"] * 4,
        ["recompute:up+down+dropout"] * 4,
        ["save:dropout/aten.native_dropout", "save:up/aten.mm", "none", "save:down/aten.mm"],
        ["offload"] * 4,
        ["full:2", "within:layers.0", "full:2", "within:layers.2"],
    ],
)
def test_gradients_are_the_same_bit_for_bit_with_dropout_active(options: list[str]) -> None:
    expected, _ = run(["none"] * 4)
    found, _ = run(options)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_offload_leaves_only_the_loss_on_the_device() -> None:
    _, held = run(["offload"] * 4)
    assert held == 512  # the loss, a block of the smallest size: the sum saves nothing


def test_full_keeps_the_inputs_of_the_layers() -> None:
    _, held = run(["full"] * 4)
    assert held == 3 * U + 512  # the first one's is the batch
