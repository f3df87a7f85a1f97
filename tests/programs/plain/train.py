"""A plain loop: argparse, relative imports, an evaluation before the first step."""

import argparse

import torch

from .model import mlp

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=16)
parser.add_argument("--steps", type=int, default=6)
args = parser.parse_args()

model = mlp(args.width)
optimizer = torch.optim.AdamW(model.parameters())
with torch.no_grad():
    print("before", model(torch.randn(4, args.width)).mean().item())
for step in range(args.steps):
    loss = model(torch.randn(4, args.width)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print("step", step, loss.item())
