"""Recording on a GPU: every byte of PyTorch's allocator has a row, and a simulation predicts the same rows."""

import gc

import pytest
import torch
from real_gpu import nearest_device
from torch import nn

from memscope import Recorder, StepPlan, Workload, record, simulate
from memscope.analysis.ledger import ledger
from memscope.gpu import watch as snapshot
from memscope.trace import CATEGORIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch finds none"),
]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def workload(width=512, **plan):
    torch.manual_seed(0)
    return Workload(
        nn.Sequential(*(Block(width) for _ in range(4))),
        [torch.randn(64, width)],
        lambda model, x: model(x).square().mean(),
        torch.optim.AdamW,
        StepPlan(**plan),
        name="blocks",
    )


@pytest.fixture(autouse=True)
def clean():
    """Frees memory of other tests and resets PyTorch's peak statistics."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


PLANS = {
    "float32": {},
    "bfloat16": {"autocast": torch.bfloat16, "micro_batches": 2},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_peaks_equal_those_counted_by_pytorch(plan):
    trace = record(lambda: workload(**plan), device="cuda")
    assert trace.peak.allocated_bytes == torch.cuda.max_memory_allocated()
    assert trace.meta["peak_reserved"] == torch.cuda.max_memory_reserved()
    assert trace.meta["size_differences"] == trace.meta["outside_allocator"] == 0
    assert not trace.meta["device"]["simulated"]
    assert trace.meta["device"]["name"] == torch.cuda.get_device_name()
    assert len(trace.meta["seconds"]) == 2


@pytest.mark.parametrize("metadata", [True, False], ids=["by metadata", "by time"])
def test_every_byte_of_the_allocator_has_a_row_at_every_moment_checked(metadata, monkeypatch):
    if not metadata:
        monkeypatch.setattr(snapshot, "_annotation", lambda: None)
    model = workload().model.to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    seen = []
    with Recorder(model, optimizer) as recorder:
        for _ in range(3):
            seen.append(torch.cuda.memory_allocated())
            model(torch.randn(64, 512, device="cuda")).square().mean().backward()
            seen.append(torch.cuda.memory_allocated())
            optimizer.step()
            optimizer.zero_grad()
        seen.append(torch.cuda.memory_allocated())
    trace = recorder.trace()
    found = iter(trace.allocated.tolist())
    assert all(size in found for size in seen), "in this order"
    assert trace.allocated[-1] == seen[-1]
    assert (sum(trace.timeline(category) for category in CATEGORIES) == trace.allocated).all()
    assert trace.by_category()["other"] < 0.005 * trace.peak.allocated_bytes
    assert trace.steps == (0, 1, 2)


def test_workspaces_of_kernels_are_named_by_the_operator_that_took_them():
    trace = record(workload, device="cuda")
    workspace = trace.category == CATEGORIES.index("workspace")
    ops = {trace.ops[op] for op in trace.op[workspace]}
    assert ops & {"aten.addmm.default", "aten.mm.default"}
    assert "" not in ops


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_simulation_predicts_the_measured_sequence(plan):
    measured = record(lambda: workload(**plan), device="cuda")
    predicted = simulate(lambda: workload(**plan), device=nearest_device())
    categories = measured.by_category()
    assert categories == predicted.by_category()
    assert measured.meta["peak_reserved"] == predicted.meta["peak_reserved"]
    after_setup = [trace.requested[trace.step >= 0].tolist() for trace in (measured, predicted)]
    assert after_setup[0] == after_setup[1]


def test_a_step_that_runs_out_of_memory_leaves_a_trace_up_to_that_point():
    total = torch.cuda.get_device_properties(0).total_memory
    # 4 x (8 x 512^2 + ...) weights of 4 bytes are 34 MiB: they and what cuBLAS takes fit into 128 MiB, AdamW's state
    # and gradients do not.
    torch.cuda.set_per_process_memory_fraction(128 * 2**20 / total)
    try:
        trace = record(workload, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = trace.meta["out_of_memory"]
    assert found is not None
    assert found["step"] == 0
    assert found["op"]
    assert found["limit"] == pytest.approx(128 * 2**20, abs=2**20)
    assert found["allocated"] == sum(found["by_category"].values())
    assert found["allocated"] <= trace.peak.allocated_bytes
    assert record(workload, device="cuda").meta["out_of_memory"] is None, "the next run is not affected"


def test_the_history_is_switched_off_even_after_an_error():
    def fail(model, x):
        model(x)
        raise ValueError("stop")

    broken = workload()
    broken.loss = fail
    with pytest.raises(Exception, match="stop"):
        record(broken, device="cuda")
    assert not torch._C._cuda_isHistoryEnabled()


def test_the_ledger_accounts_for_the_memory_that_the_driver_counts():
    found = ledger(record(workload, device="cuda"))
    if found.total("device") is None:
        pytest.skip(found.note)
    assert found["context"].added > 0
    assert found["device"].total == found["reserved"].total + found["context"].added + found["unexplained"].added
