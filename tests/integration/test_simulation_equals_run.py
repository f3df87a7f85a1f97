"""A simulation equals a real run, allocation by allocation, for every combination of the four strategies."""

import itertools

import numpy as np
import pytest

from memscope import record, simulate
from memscope.workload.target import find_target

STRATEGIES = ("ga:steps=2", "ckpt", "amp", "lora")
PLANS = [",".join(plan) for count in range(5) for plan in itertools.combinations(STRATEGIES, count)]
TARGET = find_target("llama2")
SMALL = TARGET.configure("debug", {"n_layers": "2", "dim": "48", "accumulation": "2", "seq_len": "48"})


def births_before_death(trace):
    """The number of allocations made before each one died.

    The order of deaths between two births is up to autocast.
    """
    births = np.sort(trace.born)
    return np.where(trace.freed < 0, -1, np.searchsorted(births, trace.freed))


def names(table, codes):
    return [table[code] for code in codes]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan or "plain")
def test_simulated_and_real_runs_are_the_same_list_of_allocations(plan):
    def build():
        return TARGET.build(SMALL)

    simulated, run = simulate(build, device="cpu", strategies=plan), record(build, strategies=plan)
    assert simulated.size.tolist() == run.size.tolist()
    for column in ("requested", "category", "phase", "step", "micro_batch"):
        assert getattr(simulated, column).tolist() == getattr(run, column).tolist(), column
    assert names(simulated.modules, simulated.module) == names(run.modules, run.module)
    assert births_before_death(simulated).tolist() == births_before_death(run).tolist()
    assert simulated.peak.allocated_bytes == run.peak.allocated_bytes
    assert simulated.meta["flops"] == run.meta["flops"]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan or "plain")
def test_every_byte_of_the_peak_has_an_owner(plan):
    trace = simulate(lambda: TARGET.build(SMALL), strategies=plan)
    assert trace.by_category()["other"] <= 0.005 * trace.peak.allocated_bytes
