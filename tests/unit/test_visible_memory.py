"""What `torch.cuda` tells training code of its memory in a simulation."""

import pytest
import torch
from torch import nn
from trained import train

from memscope.simulation.devices.catalogue import get_device


@pytest.mark.usefixtures("kept_workspaces")
def test_memory_statistics_are_those_of_the_allocator_so_far():
    seen = []

    def loss(model, x):
        y = model(x)
        seen.append(
            (
                torch.cuda.memory_allocated(),
                torch.cuda.max_memory_allocated(),
                torch.cuda.memory_reserved(),
                torch.cuda.memory.max_memory_reserved(),
            )
        )
        return y.sum()

    # No bias: PyTorch 2.9 to 2.11 gives a product with bias a workspace of its own.
    trace = train(loss, model=lambda: nn.Linear(8, 8, bias=False))
    # Weight, input and output in a block of 512 bytes each, and the 8,519,680 bytes of cuBLAS: in a segment of
    # 2 MiB for small blocks and one of 20 MiB for blocks below 10 MiB.
    assert seen[0] == (3 * 512 + 8_519_680, 3 * 512 + 8_519_680, 22 * 2**20, 22 * 2**20)
    # By the second step the optimizer's state is there: two moments of the weight; the backward pass's thread has
    # taken cuBLAS's memory too, and the loss of the first step is gone.
    assert seen[1][0] == (3 + 2) * 512 + 2 * 8_519_680
    assert seen[1][1] == max(trace.peak_of(0).allocated_bytes, seen[1][0])


def test_emptying_the_cache_gives_unused_segments_back():
    def model():
        return nn.Linear(2048, 2048)  # 16 MiB of weights

    def loss(empty):
        def run(model, x):
            if empty:
                torch.cuda.empty_cache()
            return model(x).sum()

        return run

    kept, emptied = (train(loss(empty), model, torch.ones(4, 2048), steps=3) for empty in (False, True))
    assert emptied.peak_of(1).allocated_bytes == kept.peak_of(1).allocated_bytes
    assert emptied.reserved.min() <= kept.reserved.min()
    assert emptied.reserved.sum() < kept.reserved.sum()


def test_the_weights_made_so_far_are_counted_while_the_model_is_built():
    seen = []

    def model():
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        built = nn.Linear(1024, 1024, bias=False)
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        return built

    train(model=model, batch=torch.ones(4, 1024))
    # 1024 · 1024 floats: a block of 4 MiB in a segment of 20 MiB, as for every block from 1 to 10 MiB.
    assert seen == [(0, 0), (4 * 2**20, 20 * 2**20)]


def test_free_memory_is_what_the_context_and_reserved_segments_leave():
    seen = []

    def loss(model, x):
        seen.append((torch.cuda.mem_get_info(), torch.cuda.memory_reserved(), torch.cuda.memory_stats()))
        return model(x).sum()

    device = get_device("a100-40gb")
    train(loss)
    for (free, total), reserved, statistics in seen:
        assert (free, total) == (device.capacity_bytes - device.context_bytes - reserved, device.capacity_bytes)
        assert statistics["reserved_bytes.all.current"] == reserved
        freed = statistics["allocated_bytes.all.allocated"] - statistics["allocated_bytes.all.freed"]
        assert freed == statistics["allocated_bytes.all.current"]


def test_peaks_are_counted_from_their_reset_on():
    seen = []

    def loss(model, x):
        torch.cuda.reset_peak_memory_stats()
        seen.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        y = model(x)
        seen.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        return y.sum()

    train(loss, model=lambda: nn.Linear(8, 8, bias=False))
    for now, peak in seen:
        assert now == peak  # the peak of the first step's backward pass is forgotten in the second
