"""Reads stdin, handles signals, starts another process, forks, stops SystemExit, and ends by sys.exit(0)."""

import os
import signal
import subprocess
import sys

import torch
from torch import nn

caught = []
signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
width = int(sys.stdin.readline())
print(
    "child says", subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout.strip()
)

model = nn.Linear(width, width)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range(3):
    model(torch.randn(2, width)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    signal.raise_signal(signal.SIGUSR1)
    if step == 0:
        child = os.fork()
        if child == 0:
            model(torch.randn(2, width)).mean().backward()
            sys.exit(5)  # runs the exit handlers of the parent
        print("fork ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("signals", len(caught))
sys.exit(0)
