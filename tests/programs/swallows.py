"""Catches everything around its step, as loops that must not die do."""

import torch
from torch import nn

model = nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(100):
    try:
        model(torch.randn(2, 8)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    except BaseException as error:
        print("caught", type(error).__name__)
print("never reached")
