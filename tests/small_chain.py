"""A chain of equal layers, small enough to simulate fast and large enough for checkpoints to pay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memscope import Workload

ROWS, WIDTH, LAYERS = 2048, 128, 6


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(torch.relu(self.up(x)))
        return h


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Half(), Half()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(x)


class Model(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def build() -> Workload:
    return Workload(Model(), [torch.ones(ROWS, WIDTH)], lambda m, x: m(x).square().mean(), torch.optim.AdamW, name="m")
