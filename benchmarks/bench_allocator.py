"""The allocator's replay, which follows every simulated step, processes at least 100,000 events per second."""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from memscope.allocator.replay import Replay, replay
from memscope.allocator.settings import AllocatorSettings
from memscope.trace import Ints

EVENTS_PER_SECOND = 100_000
KIB, MIB = 2**10, 2**20


def training_run(*, steps: int = 8, layers: int = 32, kept: int = 24, temporary: int = 40) -> tuple[Ints, Ints, Ints]:
    """Return sizes, births and frees of a transformer-like run: weights stay, activations wait for the backward pass.

    Sizes are those of a 7B model at batch 1 and 405 tokens, mixed with arbitrary ones, so that the allocator splits and
    merges blocks and the cache fragments.
    """
    rng = np.random.default_rng(7)
    shapes = np.array([405 * 4096 * 4, 405 * 11008 * 4, 32 * 405 * 405 * 4, 405 * 4096 * 2, 405 * 4, 512, 64 * KIB])
    sizes: list[int] = []
    born: list[int] = []
    freed: list[int] = []
    clock = 0

    def allocate(size: int) -> int:
        nonlocal clock
        sizes.append(size)
        born.append(clock)
        freed.append(-1)
        clock += 1
        return len(sizes) - 1

    def free(allocation: int) -> None:
        nonlocal clock
        freed[allocation] = clock
        clock += 1

    for _ in range(layers * 7):
        allocate(4096 * 4096 * 4)
    for _ in range(steps):
        waiting: list[int] = []
        for _ in range(layers):
            for size in rng.choice(shapes, kept):
                waiting.append(allocate(int(size)))
            for size in [*rng.choice(shapes, temporary // 2), *rng.integers(1, 4 * MIB, temporary // 2)]:
                free(allocate(int(size)))
        while waiting:
            pair = [allocate(int(size)) for size in rng.choice(shapes, 2)]
            free(waiting.pop())
            for allocation in pair:
                free(allocation)
    return np.array(sizes, dtype=np.int64), np.array(born, dtype=np.int64), np.array(freed, dtype=np.int64)


@pytest.mark.parametrize("text", ["", "expandable_segments:True", "max_split_size_mb:64,roundup_power2_divisions:8"])
def test_a_replay_does_100_000_events_a_second(benchmark: BenchmarkFixture, text: str) -> None:
    sizes, born, freed = training_run()
    settings = AllocatorSettings.parse(text)

    def run() -> Replay:
        return replay(sizes, born, freed, settings=settings, capacity_bytes=80 * 2**30)

    done: Replay = benchmark.pedantic(run, rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert done.oom is None
    assert benchmark.stats is not None
    rate = len(done.allocated) / benchmark.stats.stats.median
    benchmark.extra_info.update(events=len(done.allocated), events_per_second=round(rate))
    assert rate >= EVENTS_PER_SECOND, f"{rate:,.0f} events per second"
