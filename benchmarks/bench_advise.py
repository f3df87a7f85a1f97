"""The cost of planned checkpoints, against other ways to choose them, and the time that advice takes.

Costs of the layers come from simulations of the model whose memory is planned, LLaMA2-7B at 2048 tokens as the target
has it. Times of steps are estimates (memscope.analysis.cost), the same for all that is compared.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from memscope.advisor.measure.costs import measure
from memscope.advisor.measure.layers import LayerList
from memscope.advisor.measure.reference import Reference, full_probe, none_probe
from memscope.advisor.measure.runner import InProcess, Seen
from memscope.advisor.plan.planner import Chain, Choice, evaluate, plan
from memscope.simulation.devices.catalogue import get_device
from memscope.workload.target import find_target

SHARE = 0.6
SETTINGS = {"seq_len": "2048", "accumulation": "2"}
CASES = {"full": "optim:fused", "lora": "lora:r=16"}


@cache
def measured(case: str) -> tuple[Chain, int]:
    """The chain of the model's layers, and the budget at which `SHARE` of their activations may be kept."""
    target, device = find_target("targets/llama2"), get_device("a100-80gb")
    config = target.configure("7b", SETTINGS)
    runner = InProcess(lambda: target.build(config), device)
    import torch

    with torch.device("meta"):
        layers = LayerList.of(target.build(config).model)
    unlimited = 10**13
    none, full = runner.run([probe(CASES[case], layers, unlimited) for probe in (none_probe, full_probe)])
    assert isinstance(none, Seen)
    assert isinstance(full, Seen)
    chain = measure(runner.run, Reference(CASES[case], layers, none, full), device).chain()
    plain = [only(chain, layer, "none") for layer in range(len(chain.choices))]
    kept = sum(choice.kept_bytes for choice in plain)
    return chain, evaluate(chain, plain).peak_bytes - int((1 - SHARE) * kept)


def only(chain: Chain, layer: int, option: str) -> Choice:
    return chain.choice(layer, option, 1)


def every_nth(chain: Chain, n: int, offset: int) -> list[Choice]:
    layers = range(len(chain.choices))
    return [only(chain, layer, "full" if layer % n == offset else "none") for layer in layers]


def best_every_nth(chain: Chain, budget_bytes: int) -> int:
    """Least time of all ways to checkpoint every n-th layer that fit."""
    tried = [evaluate(chain, every_nth(chain, n, offset)) for n in range(1, 17) for offset in range(n)]
    return min(found.nanoseconds for found in tried if found.peak_bytes <= budget_bytes)


@pytest.mark.parametrize("case", CASES)
def test_recomputation_costs_a_third_of_checkpointing_all_layers(benchmark: BenchmarkFixture, case: str) -> None:
    """Auto-SAC's formulation is compared in bench_planner.py."""
    chain, budget_bytes = measured(case)
    found = benchmark.pedantic(lambda: plan(chain, budget_bytes), rounds=3)  # type: ignore[no-untyped-call]
    every = evaluate(chain, every_nth(chain, 1, 0)).nanoseconds
    nth = best_every_nth(chain, budget_bytes)
    benchmark.extra_info.update(
        milliseconds=found.nanoseconds / 1e6, all_layers=every / 1e6, best_every_nth=nth / 1e6, gap=found.gap
    )
    assert found.gap == 0
    assert found.nanoseconds <= every / 3
    assert found.nanoseconds <= nth / 2
    assert benchmark.stats is not None
    assert benchmark.stats.stats.median <= 2


def test_advice_on_7b_takes_less_than_45_seconds(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("memscope"), "advise", "targets/llama2", "--budget", "28GiB"]
    command += ["--device", "a100-40gb", "--allow", "lora", "-o", tmp_path / "plan.json"]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=1)  # type: ignore[no-untyped-call]
    assert benchmark.stats is not None
    assert benchmark.stats.stats.median <= 45
