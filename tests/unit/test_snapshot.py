"""The allocator's history joined to the storages of the tracker: every block has an owner in every case."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import BASE, MIB, Script, block, segment

from memscope import Recorder, record
from memscope.allocator.recorded import read_blocks
from memscope.allocator.settings import AllocatorSettings
from memscope.errors import MemscopeError, UsageError
from memscope.gpu.watch import AllocatorWatch
from memscope.trace import CATEGORIES, PHASES, Trace

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("allocator-torch-*.npz"))
RECORDED = [(path, number) for path in GOLDEN for number in range(9)]


def rows(trace):
    """`(bytes, category, op, module, phase, step)` of each block, in order of birth."""
    columns = zip(trace.size, trace.category, trace.op, trace.module, trace.phase, trace.step, strict=True)
    return [
        (int(size), CATEGORIES[c], trace.ops[o], trace.modules[m], PHASES[p], int(step))
        for size, c, o, m, p, step in columns
    ]


@pytest.fixture(params=[True, False], ids=["by metadata", "by time"])
def script(request):
    """A run whose allocator already holds one free segment of 20 MiB."""
    return Script(metadata=request.param, before=[segment(block(20 * MIB, "inactive"))])


# Blocks.


@pytest.mark.parametrize(("path", "number"), RECORDED, ids=lambda value: getattr(value, "stem", value))
def test_blocks_are_as_large_as_pytorchs_own_allocator_counts_them(path, number):
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        trace, totals = file[f"trace_{number}"].tolist(), file[f"totals_{number}"]
    entries = []
    for action, address, size, stream in trace:
        name = about["actions"][action]
        where = {"device_free": address} if name == "oom" else {"addr": address}
        entries.append({"action": name, "size": size, "stream": stream, **where})
    blocks = read_blocks([], entries, AllocatorSettings.parse(about["cases"][number]["settings"]))
    change = np.zeros(len(blocks.event_entry), dtype=np.int64)
    requested = change.copy()
    died = blocks.freed >= 0
    for column, sizes in ((change, blocks.size), (requested, blocks.requested)):
        column[blocks.born] = sizes
        column[blocks.freed[died]] = -sizes[died]
    count = len(totals)
    assert np.array_equal(change.cumsum()[:count], totals[:, 0])
    assert np.array_equal(blocks.reserved[:count], totals[:, 2])
    assert np.array_equal(requested.cumsum()[:count], totals[:, 3])
    assert blocks.peak_active == max(totals[:, 1])


def test_a_rest_too_small_to_be_split_off_belongs_to_the_block(script):
    # 19.5 MiB of a free segment of 20 MiB: half a MiB is left, less than a block of the large pool.
    with script.op("aten.empty.memory_format"):
        script.storage(script.alloc(BASE, 19 * MIB + MIB // 2), 19 * MIB + MIB // 2, "temporary")
    trace = script.trace()
    assert trace.size.tolist() == [20 * MIB]
    assert trace.requested.tolist() == [19 * MIB + MIB // 2]


def test_blocks_that_differ_from_the_snapshot_at_the_end_are_reported(script):
    script.alloc(BASE, 2 * MIB)
    assert script.trace(after=[segment(block(2 * MIB), block(18 * MIB, "inactive"))]).meta["size_differences"] == 0
    assert script.trace(after=[segment(block(3 * MIB), block(17 * MIB, "inactive"))]).meta["size_differences"] == MIB


@pytest.mark.parametrize(
    "entry", [("free_requested", BASE + 512, 512), ("alloc", BASE + 30 * MIB, 512), ("alloc", BASE, 21 * MIB)]
)
def test_a_history_that_contradicts_itself_is_refused(script, entry):
    script.entry(*entry)
    with pytest.raises(MemscopeError, match="contradicts itself"):
        script.trace()


# Owners.


def test_an_output_belongs_to_its_storage_and_the_rest_of_an_operator_is_workspace(script):
    script.phase("forward", 0)
    with script.op("aten.mm.default", "head"):
        workspace = script.alloc(BASE, 8 * MIB)
        out = script.alloc(BASE + 8 * MIB, 1000)
        script.free(workspace, 8 * MIB)
        script.storage(out, 1000, "activation", "aten.mm.default", "head")
    assert rows(script.trace()) == [
        (8 * MIB, "workspace", "aten.mm.default", "head", "forward", 0),
        (1024, "activation", "aten.mm.default", "head", "forward", 0),
    ]


def test_within_an_operator_an_output_may_lie_where_a_workspace_was(script):
    with script.op("aten.mm.default"):
        script.free(script.alloc(BASE, 4 * MIB), 4 * MIB)
        script.storage(script.alloc(BASE, 4 * MIB), 4 * MIB, "activation", "aten.mm.default")
    assert [row[1] for row in rows(script.trace())] == ["workspace", "activation"]


def test_an_address_that_is_reused_has_an_owner_each_time(script):
    for op, category in (
        ("aten.mul.Tensor", "temporary"),
        ("aten.add.Tensor", "gradient"),
        ("aten.sub.Tensor", "input"),
    ):
        with script.op(op):
            script.alloc(BASE, 512)
            script.storage(BASE, 512, category, op)
        script.free(BASE, 512)
    assert [row[1:3] for row in rows(script.trace())] == [
        ("temporary", "aten.mul.Tensor"),
        ("gradient", "aten.add.Tensor"),
        ("input", "aten.sub.Tensor"),
    ]


def test_a_storage_first_seen_by_a_later_operator_owns_the_block_taken_before_it(script):
    # As torch.tensor(1.0, device="cuda"): memory is taken past the dispatcher, lift_fresh shows the storage.
    script.alloc(BASE, 4)
    with script.op("aten.lift_fresh.default"):
        script.storage(BASE, 4, "other", "aten.lift_fresh.default")
    assert [row[:3] for row in rows(script.trace())] == [(512, "other", "aten.lift_fresh.default")]


def test_memory_that_no_operator_took_and_no_storage_holds_is_other(script):
    with script.op("aten.mm.default"):
        pass
    script.alloc(BASE, 512)
    assert rows(script.trace())[0][1:3] == ("other", "")


def test_memory_taken_between_the_beginning_of_a_phase_and_its_first_operator_is_other(script):
    script.phase("forward", 0)
    script.alloc(BASE, 512)
    assert rows(script.trace())[0][1:] == ("other", "", "(model)", "forward", 0)


def test_memory_that_no_operator_took_is_not_that_of_a_storage_that_was_there_before_it(script):
    with script.op("aten.mul.Tensor"):
        script.storage(script.alloc(BASE, 512), 512, "temporary", "aten.mul.Tensor")
    script.free(BASE, 512)
    script.alloc(BASE, 512)
    assert [row[1] for row in rows(script.trace())] == ["temporary", "other"]


def test_a_free_between_two_phases_belongs_to_the_first(script):
    script.phase("forward", 0)
    with script.op("aten.mul.Tensor"):
        for place in range(3):
            script.storage(script.alloc(BASE + 512 * place, 512), 512, "temporary", "aten.mul.Tensor")
    for place in range(3):
        script.free(BASE + 512 * place, 512)
    script.phase("backward", 0)
    with script.op("aten.mul.Tensor"):
        script.storage(script.alloc(BASE, 512), 512, "temporary", "aten.mul.Tensor")
    trace = script.trace()
    assert [PHASES[trace.mark_phase[trace.mark_at(event)]] for event in range(7)] == ["forward"] * 6 + ["backward"]


def test_a_storage_outside_the_allocator_has_no_block_but_is_counted(script):
    script.alloc(BASE, 512)
    script.storage(0x1000, 4096, "input")
    trace = script.trace()
    assert len(trace) == 1
    assert trace.meta["outside_allocator"] == 4096


def test_the_backward_thread_has_its_own_operators_and_frees(script):
    script.phase("forward", 0)
    with script.op("aten.mm.default", "head"):
        script.storage(script.alloc(BASE, 2 * MIB), 2 * MIB, "activation", "aten.mm.default", "head")
    script.phase("backward", 0)
    script.thread = "autograd"
    with script.op("aten.mm.default", "head"):
        script.alloc(BASE + 2 * MIB, 8 * MIB)
        script.storage(script.alloc(BASE + 10 * MIB, MIB), MIB, "gradient", "aten.mm.default", "head")
    script.free(BASE, 2 * MIB)
    script.thread = "main"  # its last annotation is from before the backward pass
    script.phase("optimizer", 0)
    trace = script.trace()
    assert [row[1::3] for row in rows(trace)] == [
        ("activation", "forward"),
        ("workspace", "backward"),
        ("gradient", "backward"),
    ]
    assert trace.freed.tolist() == [3, -1, -1]
    assert PHASES[trace.mark_phase[trace.mark_at(3)]] == "backward"


def test_gradients_freed_without_any_operator_are_freed_in_zero_grad(script):
    script.phase("optimizer", 0)
    with script.op("aten.add_.Tensor"):
        script.storage(script.alloc(BASE, 2 * MIB), 2 * MIB, "gradient", "aten.add_.Tensor")
    script.phase("zero_grad", 0)
    script.free(BASE, 2 * MIB)
    script.phase("forward", 1)
    with script.op("aten.mm.default"):
        script.storage(script.alloc(BASE, 512), 512, "activation", "aten.mm.default")
    trace = script.trace()
    phases = [
        (PHASES[trace.mark_phase[trace.mark_at(event)]], trace.mark_step[trace.mark_at(event)]) for event in range(3)
    ]
    assert phases == [("optimizer", 0), ("zero_grad", 0), ("forward", 1)]


def test_a_block_that_another_stream_still_uses_is_not_allocated_but_active(script):
    with script.op("aten.mul.Tensor"):
        script.storage(script.alloc(BASE, 2 * MIB), 2 * MIB, "temporary", "aten.mul.Tensor")
    script.entry("free_requested", BASE, 2 * MIB)
    with script.op("aten.mul.Tensor"):
        script.storage(script.alloc(BASE + 2 * MIB, 2 * MIB), 2 * MIB, "temporary", "aten.mul.Tensor")
    script.entry("free_completed", BASE, 2 * MIB)
    trace = script.trace()
    assert trace.allocated.tolist() == [2 * MIB, 0, 2 * MIB]
    assert trace.meta["peak_active"] == 4 * MIB


def test_a_resized_storage_takes_new_memory_before_it_gives_back_the_old(script):
    with script.op("aten.empty.memory_format"):
        script.storage(script.alloc(BASE, 2 * MIB), 2 * MIB, "parameter", "aten.empty.memory_format")
    with script.op("UntypedStorage.resize_"):
        script.alloc(BASE + 2 * MIB, 4 * MIB)
        script.free(BASE, 2 * MIB)
        script.storage(BASE + 2 * MIB, 4 * MIB, "parameter", "UntypedStorage.resize_")
    trace = script.trace()
    assert [row[:2] for row in rows(trace)] == [(2 * MIB, "parameter"), (4 * MIB, "parameter")]
    assert trace.allocated.tolist() == [2 * MIB, 6 * MIB, 4 * MIB]


# What was there before.


def there_before():
    return Script(
        before=[
            segment(block(MIB, requested=MIB - 100), block(2 * MIB), block(17 * MIB, "inactive")),
            segment(block(2 * MIB, "active_pending_free"), address=BASE + 64 * MIB),
        ]
    )


def test_blocks_from_before_come_first_with_their_sizes_and_the_owners_taken_in():
    script = there_before()
    script.storage(BASE + MIB, 2 * MIB, "parameter", module="head")
    script.phase("forward", 0)
    with script.op("aten.mm.default"):
        script.storage(script.alloc(BASE + 3 * MIB, 3 * MIB), 3 * MIB, "activation", "aten.mm.default")
    trace = script.trace()
    assert rows(trace) == [
        (2 * MIB, "parameter", "", "head", "setup", -1),
        (MIB, "other", "", "(model)", "setup", -1),
        (3 * MIB, "activation", "aten.mm.default", "(model)", "forward", 0),
    ]
    assert trace.requested.tolist() == [2 * MIB, MIB - 100, 3 * MIB]
    assert trace.reserved.tolist() == [22 * MIB] * 3
    assert trace.meta["peak_active"] == 8 * MIB, "with the one another stream still uses"
    assert PHASES[trace.mark_phase[trace.mark_at(1)]] == "setup"
    assert PHASES[trace.mark_phase[trace.mark_at(2)]] == "forward"


def test_a_block_from_before_can_be_freed_and_its_memory_used_again():
    script = there_before()
    script.free(BASE, MIB - 100)
    script.entry("free_completed", BASE + 64 * MIB, 2 * MIB)
    with script.op("aten.mm.default"):
        script.storage(script.alloc(BASE, MIB // 2), MIB // 2, "activation", "aten.mm.default")
        script.storage(script.alloc(BASE + 64 * MIB, 2 * MIB), 2 * MIB, "activation", "aten.mm.default")
    assert script.trace().allocated.tolist() == [MIB, 3 * MIB, 2 * MIB, 2 * MIB + MIB // 2, 4 * MIB + MIB // 2]


# Reserved memory, and its end.


def test_reserved_follows_the_segments(script):
    with script.op("aten.mm.default"):
        script.entry("segment_alloc", BASE + 64 * MIB, 22 * MIB)
        script.storage(script.alloc(BASE + 64 * MIB, 22 * MIB), 22 * MIB, "activation", "aten.mm.default")
    script.free(BASE + 64 * MIB, 22 * MIB)
    script.entry("segment_free", BASE + 64 * MIB, 22 * MIB)
    script.entry("segment_free", BASE, 20 * MIB)
    with script.op("aten.mm.default"):
        script.entry("segment_alloc", BASE, 2 * MIB)
        script.storage(script.alloc(BASE, 512), 512, "activation", "aten.mm.default")
    trace = script.trace()
    assert trace.reserved.tolist() == [42 * MIB, 42 * MIB, 2 * MIB]
    assert trace.meta["peak_reserved"] == 42 * MIB


def test_an_expandable_segment_grows_and_gives_back_pages_from_its_middle():
    script = Script(conf="expandable_segments:True")
    script.entry("segment_map", BASE, 20 * MIB)
    script.alloc(BASE, 15 * MIB)
    script.entry("segment_map", BASE + 20 * MIB, 20 * MIB)
    script.alloc(BASE + 15 * MIB, 25 * MIB - 512)  # across both; a rest of 512 bytes is split off
    script.free(BASE, 15 * MIB)
    script.entry("segment_unmap", BASE, 14 * MIB)
    script.alloc(BASE + 14 * MIB, MIB)
    script.entry("segment_map", BASE, 2 * MIB)
    script.alloc(BASE, 2 * MIB)
    trace = script.trace()
    assert trace.size.tolist() == [15 * MIB, 25 * MIB - 512, MIB, 2 * MIB]
    assert trace.reserved.tolist() == [20 * MIB, 40 * MIB, 40 * MIB, 26 * MIB, 28 * MIB]


def out_of_memory(script):
    script.phase("backward", 1, 2)
    with script.op("aten.mm.default", "head"):
        script.storage(script.alloc(BASE, 4 * MIB), 4 * MIB, "activation", "aten.mm.default")
        script.alloc(BASE + 4 * MIB, 2 * MIB)
        script.free(BASE + 4 * MIB, 2 * MIB)
    script.moments.begin(
        script.ops.index("aten.mm.default"), script.modules.index("head"), PHASES.index("backward"), 1, 2
    )
    script.entry("oom", 5 * MIB, 30 * MIB)


def test_an_out_of_memory_error_records_the_request_and_the_memory_in_use(script):
    out_of_memory(script)
    trace = script.trace(ran_out=True)
    assert trace.meta["out_of_memory"] == {
        "event": 3,
        "step": 1,
        "micro_batch": 2,
        "phase": "backward",
        "module": "head",
        "op": "aten.mm.default",
        "category": None,
        "requested": 30 * MIB,
        "allocated": 4 * MIB,
        "reserved": 20 * MIB,
        "largest_free": 16 * MIB,
        "limit": 25 * MIB,
        "by_category": {category: 4 * MIB * (category == "activation") for category in CATEGORIES},
    }


def test_the_limit_of_the_process_comes_before_the_free_memory_of_the_device(script):
    out_of_memory(script)
    assert script.trace(ran_out=True, limit=21 * MIB).meta["out_of_memory"]["limit"] == 21 * MIB


def test_an_out_of_memory_error_that_the_run_survived_is_a_note(script):
    out_of_memory(script)
    meta = script.trace().meta
    assert meta["out_of_memory"] is None
    assert meta["notes"] == ["The GPU ran out of memory, last in step 1 · backward, and the program went on"]


def test_a_program_that_caught_the_error_ran_out_if_its_last_step_did(script):
    out_of_memory(script)
    assert script.trace(ran_out=None).meta["out_of_memory"]["step"] == 1
    script.moments.end()
    script.phase("forward", 2)
    script.alloc(BASE + 4 * MIB, 2 * MIB)
    assert script.trace(ran_out=None).meta["out_of_memory"] is None


def test_a_joined_trace_is_written_and_read_like_any_other(script, tmp_path):
    out_of_memory(script)
    trace = script.trace(ran_out=True)
    again = Trace.load(trace.save(tmp_path / "trace.npz"))
    assert again.by_category() == trace.by_category()
    assert again.meta == trace.meta


# Where there is no GPU.


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_recording_on_a_missing_gpu_says_how_to_simulate_one():
    with pytest.raises(UsageError, match=r'"cuda".*--device gpu'):
        record(lambda: pytest.fail("the target must not be built"), device="cuda")


def test_a_model_on_the_host_is_recorded_without_the_gpus_allocator(monkeypatch):
    monkeypatch.setattr(AllocatorWatch, "__enter__", lambda self: pytest.fail("the history was switched on"))
    model = torch.nn.Linear(2, 2)
    with Recorder(model) as recorder:
        model(torch.ones(1, 2))
    assert not recorder.trace().reserved.size
