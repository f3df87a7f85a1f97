"""From requested to reserved: workspaces of kernels, blocks of the allocator, and running out of memory."""

import dataclasses

import pytest
import torch
from torch import nn

from memscope import Workload, record, simulate
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.ledger import ledger
from memscope.simulation.device_memory import SMALL_SEGMENT_BYTES, least_reserved
from memscope.simulation.devices.catalogue import get_device
from memscope.trace import CATEGORIES, Trace
from tests.traces import TraceBuilder

MIB = 2**20


def workload(width=1024):
    return Workload(
        nn.Linear(width, width, bias=False),
        [torch.ones(8, width)],
        lambda m, x: m(x).sum(),
        torch.optim.SGD,
        name="linear",
    )


def trace_of(width=1024, **how):
    return simulate(lambda: workload(width), **how)


@pytest.fixture(autouse=True)
def default_cublas(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("TORCH_CUBLAS_WORKSPACE_CACHE", "1")  # as before PyTorch 2.15


def test_the_forward_and_the_backward_thread_each_keep_one_cublas_workspace():
    # 2 x 4096 KiB + 8 x 16 KiB: PyTorch's default up to 2.14 on this architecture.
    trace = trace_of()
    kept = (trace.category == CATEGORIES.index("workspace")) & (trace.freed < 0)
    assert trace.requested[kept].tolist() == [8_519_680, 8_519_680]
    assert {trace.ops[op] for op in trace.op[kept]} == {"aten.mm.default"}


def test_an_expanded_gradient_is_copied_inside_the_matrix_product_that_reads_it():
    # The gradient of sum() is one number expanded to [8, 1024]; cuBLAS needs it in memory, 4 bytes an element.
    trace = trace_of()
    passing = (trace.category == CATEGORIES.index("workspace")) & (trace.freed >= 0)
    assert set(trace.requested[passing].tolist()) == {8 * 1024 * 4}


def test_the_backward_of_a_softmax_takes_a_product_as_large_as_its_gradient():
    weight_free = Workload(
        nn.Linear(64, 64, bias=False),
        [torch.ones(32, 64)],
        lambda m, x: m(x).softmax(-1).square().sum(),
        torch.optim.SGD,
    )
    trace = simulate(weight_free)
    softmax = [i for i, op in enumerate(trace.op) if trace.ops[op] == "aten._softmax_backward_data.default"]
    per_step = [(CATEGORIES[trace.category[i]], int(trace.requested[i])) for i in softmax[:2]]
    assert per_step == [("temporary", 32 * 64 * 4), ("workspace", 32 * 64 * 4)]


def test_requests_below_one_mebibyte_come_from_segments_of_two_mebibytes():
    trace = trace_of(width=256)
    small = trace.requested <= MIB
    assert small.any()
    weight = trace.size[trace.requested == 256 * 256 * 4]
    assert set(weight.tolist()) == {256 * 256 * 4}
    # Everything small fits into one segment. A cuBLAS workspace of 8.125 MiB gets a segment of 20 MiB, whose remainder
    # has room for the other one.
    assert trace.meta["peak_reserved"] == 2 * MIB + 20 * MIB


def test_reserved_is_never_less_than_allocated():
    trace = trace_of()
    assert (trace.reserved >= trace.allocated).all()
    assert trace.reserved.size == trace.events


def test_the_ledger_leads_from_the_tensors_to_the_device():
    trace = trace_of(device="a100-40gb")
    found = ledger(trace)
    names = [line.name for line in found.lines]
    assert names == ["requested", "allocated", "reserved", "device"]
    totals = [line.total for line in found.lines]
    assert totals == sorted(totals)
    assert all(
        later.total - line.total == later.added for line, later in zip(found.lines, found.lines[1:], strict=False)
    )
    assert found["allocated"].total == trace.peak.allocated_bytes
    assert found["device"].added == get_device("a100-40gb").context_bytes
    assert [line.name for line in found.lines if line.estimate] == ["device"]


def test_a_run_on_the_cpu_has_no_ledger():
    assert ledger(record(workload())) is None


def limited(capacity_bytes):
    return dataclasses.replace(get_device("gpu"), name="limited", capacity_bytes=capacity_bytes)


def test_a_device_that_is_too_small_reports_the_failed_request_and_the_whole_step():
    # The weight takes 64 MiB and its gradient as much again: 100 MiB hold one of them.
    trace = trace_of(width=4096, device=limited(100 * MIB))
    oom = trace.meta["out_of_memory"]
    assert (oom["step"], oom["phase"], oom["requested"]) == (0, "backward", 64 * MIB)
    assert oom["limit"] == 100 * MIB
    assert oom["by_category"]["parameter"] == 64 * MIB
    assert oom["allocated"] + oom["requested"] > oom["limit"]
    assert trace.peak.allocated_bytes > 128 * MIB, "the trace shows what would be needed"


def test_a_device_that_is_large_enough_is_no_limit():
    assert trace_of(width=4096, device=limited(256 * MIB)).meta["out_of_memory"] is None


def test_allocator_settings_decide_the_size_of_a_block(monkeypatch):
    def weight_block(**how):
        trace = trace_of(width=1000, **how)
        return set(trace.size[trace.requested == 1000 * 1000 * 4].tolist())

    # 3.8 MiB: in whole blocks of 512 bytes, or up to the next half of the way from 2 to 4 MiB.
    rounded = 1000 * 1000 * 4 // 512 * 512 + 512
    assert weight_block() == {rounded}
    assert weight_block(allocator=AllocatorSettings.parse("roundup_power2_divisions:2")) == {4 * MIB}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "roundup_power2_divisions:2")
    assert weight_block() == {4 * MIB}


def trace_with(*sizes_mib: int) -> Trace:
    """Allocations one after the other, each freed before the next."""
    built = TraceBuilder()
    built.phase("forward", 0)
    for size in sizes_mib:
        built.free(built.new("activation", size * MIB))
    return built.trace()


def test_the_allocator_of_another_release_is_followed_and_named_in_the_trace():
    # By the rules: 5 MiB and 200 KiB round up to 6 MiB since 2.10, where `>` leaves the 4 divisions from 4 MiB alone.
    def reserved(version):
        settings = AllocatorSettings.parse(f"roundup_power2_divisions:[4:4,>:1],version:{version}")
        trace = trace_of(width=1152, allocator=settings)
        (weight,) = trace.size[(trace.category == CATEGORIES.index("parameter"))].tolist()
        return weight, trace.meta["allocator"]["settings"]["version"], trace.meta.get("notes", [])

    weight, version, notes = reserved("2.4.1")
    assert (weight, version) == (1152 * 1152 * 4, "2.4")
    assert "PyTorch 2.4 takes the lowest address of several cached blocks of equal size" in notes[0]
    assert reserved("2.12") == (6 * MIB, "2.12", [])


def test_without_a_version_the_trace_names_the_installed_release():
    installed = ".".join(torch.__version__.split(".")[:2])
    assert trace_of(width=16).meta["allocator"]["settings"]["version"] == installed


@pytest.mark.parametrize(("sizes_mib", "least_mib"), [((60, 64), 64), ((20, 40, 60, 80), 80), ((64, 60), 64)])
def test_the_least_reserved_bytes_are_those_of_a_cache_that_is_returned_in_time(sizes_mib, least_mib):
    # Without a limit, each larger request gets a segment of its own, and the smaller ones stay in the cache.
    found = least_reserved(trace_with(*sizes_mib), AllocatorSettings())
    assert least_mib * MIB <= found <= least_mib * MIB + SMALL_SEGMENT_BYTES


def test_the_least_reserved_bytes_count_the_caches_that_the_target_empties_itself():
    # 12 MiB would stay in what is left of the 30 MiB; 31 MiB, a segment of 32, then need more room than after an
    # empty cache. Events: 30 MiB made and freed, 12 MiB, 31 MiB.
    built = TraceBuilder()
    built.phase("forward", 0)
    built.free(built.new("activation", 30 * MIB))
    for size in (12, 31):
        built.new("activation", size * MIB)
    trace = built.trace()
    emptied = dataclasses.replace(trace, meta={**trace.meta, "allocator": {"cache_emptied": [2]}})
    assert least_reserved(trace, AllocatorSettings()) == (30 + 32) * MIB
    assert least_reserved(emptied, AllocatorSettings()) == (12 + 32) * MIB
