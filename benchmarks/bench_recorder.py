"""What `Recorder` adds to a training step on the CPU, for each allocation, at steps of about 100 ms and 1 s.

A transformer encoder of 6 and of 60 layers of width 256, 4 sequences of 64 tokens, AdamW, one thread. Steps without and
with a recorder alternate, and the shortest of each counts, in CPU time.

The floor is a dispatch mode that does nothing: what PyTorch itself takes to call Python for every operator, of which
there are about three to an allocation. Under any such mode, autograd also adds gradients out of place, which costs more
the larger they are. No recorder of operators can be faster; the bound is on what memscope adds to it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memscope import Recorder

MOST_MICROSECONDS = 60
"""Bound on the CPU time that memscope adds for each allocation to that of an empty dispatch mode."""
ROUNDS = 5


class _Nothing(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def training(layers: int) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A model, its optimizer, and a function that makes one step."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(4, 64, 256)

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def cpu_seconds(step: Callable[[], None], scope: contextlib.AbstractContextManager[Any]) -> float:
    """CPU time of the second of two steps within a scope."""
    with scope:
        step()
        began = time.process_time()
        step()
        return time.process_time() - began


@pytest.mark.parametrize("layers", [6, 60], ids=["about 100 ms", "about 1 s"])
def test_a_recorder_adds_little_to_each_allocation(layers: int, benchmark: BenchmarkFixture) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, optimizer, step = training(layers)
        found: dict[str, list[float]] = {"bare": [], "mode": [], "recorded": []}

        def measured() -> None:
            recorder = Recorder(model, optimizer)
            found["bare"].append(cpu_seconds(step, contextlib.nullcontext()))
            found["mode"].append(cpu_seconds(step, _Nothing()))  # type: ignore[no-untyped-call]
            found["recorded"].append(cpu_seconds(step, recorder))
            trace = recorder.trace()
            benchmark.extra_info["allocations"] = int((trace.step == 1).sum())

        benchmark.pedantic(measured, rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]
    finally:
        torch.set_num_threads(threads)
    least = {name: min(seconds) for name, seconds in found.items()}
    each = 1e6 / benchmark.extra_info["allocations"]
    added = {name: (seconds - least["bare"]) * each for name, seconds in least.items()}
    own = added["recorded"] - added["mode"]
    benchmark.extra_info |= {"step_seconds": least["bare"], "microseconds": added["recorded"], "mode": added["mode"]}
    print(
        f"\nbare step {least['bare'] * 1000:.0f} ms, {benchmark.extra_info['allocations']:,} allocations: a recorder "
        f"adds {added['recorded']:.0f} µs to each: {added['mode']:.0f} µs of an empty mode, {own:.0f} µs of its own"
    )
    assert own <= MOST_MICROSECONDS
