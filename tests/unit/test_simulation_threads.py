"""Simulations in several threads: one after the other, since each changes PyTorch for the whole process."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from memscope import Workload, simulate
from memscope.errors import UsageError


def workload(build=lambda: nn.Linear(8, 8), loss=lambda model, x: model(x).mean()):
    return Workload(
        model=build(), batches=[torch.ones(4, 8)], loss=loss, optimizer_factory=torch.optim.AdamW, name="mine"
    )


def test_simulations_in_three_threads_take_turns_and_leave_pytorch_as_it_was():
    before = torch.cuda.is_available, vars(torch.Tensor).copy(), torch._subclasses.FakeTensor
    running, most = [], []
    entered = threading.Lock()

    def build():
        with entered:
            running.append(threading.get_ident())
            most.append(len(running))
        time.sleep(0.02)  # time for another thread to begin; the test passes without
        return nn.Linear(8, 8)

    def loss(model, x):
        assert x.is_cuda
        assert torch.cuda.is_available()
        running.clear()
        return model(x).mean()

    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(simulate, lambda: workload(build, loss)) for _ in range(3)]
        traces = [future.result() for future in futures]
    alone = simulate(lambda: workload())
    assert most == [1, 1, 1]
    assert all(trace.size.tolist() == alone.size.tolist() for trace in traces)
    after = torch.cuda.is_available, vars(torch.Tensor).copy(), torch._subclasses.FakeTensor
    assert after == before


def test_the_next_simulation_runs_after_one_that_failed():
    def fails():
        raise KeyError("lost")

    with pytest.raises(Exception, match="lost"):
        simulate(lambda: workload(fails))
    assert simulate(lambda: workload()).events


@pytest.mark.parametrize("where", ["build", "loss"])
def test_a_simulation_inside_a_simulation_is_refused(where):
    def nested(model=None, x=None):
        simulate(lambda: workload())
        return nn.Linear(8, 8)

    with pytest.raises(UsageError, match="simulations cannot be nested"):
        simulate(lambda: workload(**{where: nested}))
    assert simulate(lambda: workload()).events
