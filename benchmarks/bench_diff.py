"""`diff` of two traces of a 7B model takes at most two seconds, including reading the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from memscope import Trace, simulate
from memscope.analysis.diff import Difference, diff
from memscope.workload.description import Workload
from memscope.workload.target import find_target

MOST_SECONDS = 2
PLANS = ("lora:r=8", "ckpt,amp")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The trace files of two steps of LLaMA2-7B, one for each plan."""
    folder = tmp_path_factory.mktemp("diff")

    def build() -> Workload:
        target = find_target("llama2")
        workload: Workload = target.build(target.configure("7b", {}))
        return workload

    return [
        simulate(build, device="a100-80gb", strategies=plan).save(folder / f"{index}.npz")
        for index, plan in enumerate(PLANS)
    ]


def test_two_traces_of_7b_are_compared_in_two_seconds(benchmark: BenchmarkFixture, traces: list[Path]) -> None:
    def compared() -> Difference:
        before, after = map(Trace.load, traces)
        return diff(before, after)

    found = benchmark.pedantic(compared, rounds=3)  # type: ignore[no-untyped-call]
    sizes = [len(Trace.load(path)) for path in traces]
    benchmark.extra_info.update(allocations=sizes, changes=len(found.allocations))
    assert benchmark.stats.stats.max <= MOST_SECONDS
