"""Train a small workload on a simulated GPU."""

import torch
from torch import nn

from memscope import Workload, simulate


def train(loss=lambda m, x: m(x).sum(), model=lambda: nn.Linear(8, 8), batch=None, device="a100-40gb", **settings):
    def build():
        data = torch.ones(4, 8) if batch is None else batch
        return Workload(model(), [data], loss, torch.optim.AdamW, name="mine")

    return simulate(build, device=device, **settings)
