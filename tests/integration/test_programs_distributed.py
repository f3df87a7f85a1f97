"""Programs that `torchrun --nproc-per-node 1` starts: `torch.distributed` with one process."""

import socket

import pytest
import torch
import torch.distributed as dist
from program_runs import PROGRAMS, run_program, run_source

from memscope.simulation.refusal import NotSimulated


@pytest.fixture(autouse=True)
def torchrun(monkeypatch):
    """The environment that torchrun gives to the process, and the end of its process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def steps_of(trace):
    columns = (trace.requested, trace.op, trace.module, trace.phase, trace.step)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(size, trace.ops[op], trace.modules[m], phase, step) for size, op, m, phase, step in rows if step >= 0]


def test_data_parallel_training_is_its_recording():
    simulated = run_program(PROGRAMS / "ddp.py", device="cpu")
    dist.destroy_process_group()
    recorded = run_program(PROGRAMS / "ddp.py", device="cpu", simulated=False)
    assert steps_of(simulated.trace) == steps_of(recorded.trace)
    assert "NCCL" in simulated.notes[0]


def test_data_parallel_training_holds_its_buckets_on_the_gpu():
    trace = run_program(PROGRAMS / "ddp.py").trace
    weights = 4 * (64 * 256 + 256 + 2 * 256 + 256 * 8 + 8)
    gradients = trace.by("category", at="peak")["gradient"]
    assert weights <= gradients < weights + 6 * 512  # blocks of 512 bytes
    size, op = trace.requested.tolist(), [trace.ops[code] for code in trace.op.tolist()]
    buckets = [row for row in range(len(size)) if size[row] == weights and op[row] == "aten.empty.memory_format"]
    first, second = buckets  # made again, in the order in which gradients were ready, when the first is gone
    assert trace.freed[first] < trace.born[second]
    assert trace.freed[second] < 0


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("torch.distributed.init_process_group('nccl', rank=0, world_size=2, init_method='env://')", "for 2 processes"),
        (
            """
            from torch.distributed.fsdp import fully_shard
            fully_shard(nn.Linear(4, 4).cuda())
            """,
            "fully_shard cannot be simulated: sharded training",
        ),
        (
            """
            torch.distributed.init_process_group('nccl')
            model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4).cuda(), device_ids=[0])
            model.register_comm_hook(None, print)
            """,
            "register_comm_hook cannot be simulated",
        ),
    ],
)
def test_what_needs_several_processes_is_refused(source, told, tmp_path):
    with pytest.raises(NotSimulated, match=told):
        run_source(tmp_path, source)
    assert torch.distributed.distributed_c10d.init_process_group is dist.init_process_group
