"""Memory snapshots in every layout that PyTorch has written, and of several GPUs."""

import numpy as np
import pytest
from histories import BASE, MIB, Script, block, segment
from snapshots import FORWARD, GOLDEN, Golden, came_of, categories, entry, frame, notes, segments_at_end, snapshot

from memscope.errors import UsageError
from memscope.exchange.torch_reader import INFERRED
from memscope.trace import CATEGORIES, PHASES


def test_private_pools_other_streams_and_further_fields_of_pytorch_2_13_are_read(imported):
    noted = {"compile_context": "N/A", "user_metadata": "step 3", "pool_id": (0, 1), "stream": 123323568}
    traced = {"fx_node_op": "call_function", "fx_node_name": "relu", "fx_original_trace": "relu(x)"}
    stack = [{**frame("forward", "/m/model.py", 7), **traced}, frame("_call_impl", "/x/torch/nn/modules/module.py", 9)]
    graph = segment(block(3 * MIB, requested=3 * MIB - 8), block(17 * MIB, "inactive"), address=BASE + 64 * MIB)
    private = {**graph, "segment_pool_id": (0, 1), "stream": 123323568, "registration_counter": -1}
    history = [
        entry("segment_alloc", BASE + 64 * MIB, 20 * MIB, **noted),
        entry("alloc", BASE + 64 * MIB, 3 * MIB - 8, *stack, **noted),
    ]
    data = snapshot([segment(block(2 * MIB)), private], history)
    trace = imported({**data, "allocator_settings": {**came_of(""), "graph_capture_record_stream_reuse": False}})
    assert trace.size.tolist() == [2 * MIB, 3 * MIB]
    assert trace.requested.tolist() == [2 * MIB, 3 * MIB - 8]
    assert trace.reserved.tolist() == [2 * MIB, 22 * MIB]
    assert [trace.modules[code] for code in trace.module] == ["(unknown)", "model"]
    assert notes(trace) == []


def test_a_bare_list_of_segments_is_a_trace_of_the_live_blocks(imported):
    # torch.cuda.memory_snapshot(), PyTorch 1.10: blocks have a size and a state.
    blocks = [{"size": 2 * MIB, "state": "active_allocated"}, {"size": 18 * MIB, "state": "inactive"}]
    about = {"device": 0, "address": BASE, "total_size": 20 * MIB, "segment_type": "large", "blocks": blocks}
    trace = imported([about])
    assert trace.size.tolist() == [2 * MIB]
    assert trace.reserved.tolist() == [20 * MIB]


def test_stacks_in_the_history_of_a_block_are_read(imported):
    # PyTorch 1.13 and 2.0: `_block_extra_legacy` in torch/cuda/_memory_viz.py.
    history = [{"addr": BASE, "real_size": 1000, "frames": [frame("__init__", "/x/torch/nn/modules/linear.py", 96)]}]
    blocks = [{"size": 1024, "state": "active_allocated", "history": history}, {"size": 1024, "state": "inactive"}]
    about = {"device": 0, "address": BASE, "total_size": 2048, "stream": 0, "blocks": blocks}
    trace = imported({"segments": [about], "device_traces": [[]]}, protocol=3)
    assert trace.requested.tolist() == [1000]
    assert categories(trace) == ["parameter"]
    assert trace.ops == ("linear.py:96 __init__",)


def test_entries_without_stacks_clocks_and_settings_are_read(imported):
    # PyTorch 2.0: `frames` only where recorded, neither `time_us` nor `allocator_settings`.
    actions = ("alloc", "free_requested", "free_completed")
    history = [{"action": action, "addr": BASE, "size": 512, "stream": 0} for action in actions]
    trace = imported({"segments": [segment(block(2 * MIB, "inactive"))], "device_traces": [history]}, protocol=2)
    assert trace.allocated.tolist() == [512, 0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_gives_the_same_trace(imported, protocol):
    known = Golden(*GOLDEN[0])
    trace = imported(snapshot(segments_at_end(known), known.entries, conf=known.conf), protocol)
    assert np.array_equal(trace.allocated[: len(known.totals)], known.totals[:, 0])


def test_unknown_kinds_of_entries_are_skipped_and_reported(imported):
    history = [entry("alloc", BASE, 512), entry("snapshot", 0, 0), entry("segment_swap", BASE, 2 * MIB)]
    trace = imported(snapshot([segment(block(512), block(2 * MIB - 512, "inactive"))], history))
    assert trace.events == 1
    assert any(note == "entries of kinds unknown to this version of memscope: 1 (ignored)" for note in notes(trace))


# Several GPUs.


def two_gpus():
    other = {**segment(block(4 * MIB)), "device": 1}
    return snapshot([segment(block(2 * MIB)), other], [], [entry("snapshot", 0, 0)])


def test_a_gpu_with_only_a_snapshot_entry_is_not_offered(imported):
    # A process on GPU 1 with enabled="state", which keeps each GPU's last entry: GPU 0 has only its "snapshot" entry.
    here = {**segment(block(2 * MIB), block(18 * MIB, "inactive")), "device": 1}
    last = {"action": "free_completed", "addr": BASE + 2 * MIB, "size": 512, "stream": 0}
    trace = imported(snapshot([here], [{"action": "snapshot", "addr": 0, "size": 0, "stream": 0}], [last]))
    assert trace.meta["device"]["name"] == "GPU 1"
    assert trace.size.tolist() == [2 * MIB]
    assert trace.meta["size_differences"] == 0


def test_one_of_several_gpus_must_be_chosen(imported):
    with pytest.raises(UsageError, match=r"several GPUs: choose one of 0, 1 with --device"):
        imported(two_gpus())
    assert imported(two_gpus(), device=1).size.tolist() == [4 * MIB]


def test_a_missing_gpu_is_refused(imported):
    with pytest.raises(UsageError, match=r"does not hold GPU 7: choose one of 0, 1 with --device"):
        imported(two_gpus(), device=7)


def test_the_only_gpu_is_found_whatever_its_number(imported):
    trace = imported(snapshot([{**segment(block(4 * MIB)), "device": 3}], [], [], [], []))
    assert trace.meta["device"] == {"name": "GPU 3", "simulated": False}


def recorded_with_labels(script):
    """A step as a recorder follows it: a weight from before, an activation, a gradient, and a temporary."""
    script.storage(BASE, MIB, "parameter", module="head")
    script.moments.owned(0, CATEGORIES.index("parameter"), script.modules.index("head"))
    script.phase("forward", 0)
    with script.op("aten.mm.default", "head"):
        script.storage(script.alloc(BASE + MIB, 2 * MIB), 2 * MIB, "activation", "aten.mm.default", "head")
    with script.op("aten.relu.default", "relu"):
        script.storage(script.alloc(BASE + 3 * MIB, MIB), MIB, "temporary", "aten.relu.default", "relu")
    script.free(BASE + 3 * MIB, MIB)
    script.moments.owned(1, CATEGORIES.index("activation"), script.modules.index("head"))
    script.phase("backward", 0, 1)
    with script.op("aten.mm.default", "head"):
        script.storage(script.alloc(BASE + 3 * MIB, MIB), MIB, "gradient", "aten.mm.default", "head")
    script.moments.owned(3, CATEGORIES.index("gradient"), script.modules.index("head"))
    return script.entries


def test_labels_of_a_recorder_say_what_each_block_is_for_and_stacks_are_not_asked(imported):
    before = [segment(block(MIB), block(19 * MIB, "inactive"))]
    script = Script(before=before)
    entries = [{"frames": list(FORWARD), **one} for one in recorded_with_labels(script)]
    assert {one["action"] for one in entries} == {"alloc", "free_requested", "free_completed", "annotate"}
    after = segment(block(MIB), block(2 * MIB), block(MIB), block(16 * MIB, "inactive"))
    trace, expected = imported(snapshot([after], entries)), script.trace()
    assert rows_of(trace) == rows_of(expected)
    assert trace.steps == (0,)
    assert notes(trace) == []
    # No label says of the temporary what it is for: PyTorch annotates live blocks alone.
    assert trace.meta["inferred"] == ["category"]


def rows_of(trace):
    """Every allocation by name, with its birth and death."""
    columns = (trace.size, trace.step, trace.micro_batch, trace.born, trace.freed)
    named = zip(categories(trace), trace.module, trace.op, trace.phase, strict=True)
    return [
        (category, trace.modules[module], trace.ops[op], PHASES[phase], *(int(column[row]) for column in columns))
        for row, (category, module, op, phase) in enumerate(named)
    ]


def test_where_every_block_has_its_labels_nothing_is_inferred(imported):
    script = Script()
    with script.op("aten.mm.default", "head"):
        script.storage(script.alloc(BASE, MIB), MIB, "activation", "aten.mm.default", "head")
    script.moments.owned(0, CATEGORIES.index("activation"), script.modules.index("head"))
    entries = [{"frames": [], **one} for one in script.entries]
    trace = imported(snapshot([segment(block(MIB), block(MIB, "inactive"))], entries))
    assert trace.meta["inferred"] == []
    assert categories(trace) == ["activation"]


@pytest.mark.parametrize(
    "text",
    [
        "step 3",
        '{"memscope":1,',
        '{"memscope":1,"category":"mine","module":"head"}',
        '{"memscope":1,"category":["activation"],"module":"head"}',
        '{"memscope":1,"category":"activation","module":3}',
        '{"memscope":1,"number":1,"phase":"forward","step":-2,"micro_batch":0,"op":"aten.mm","module":"head"}',
        '{"memscope":1,"number":1,"phase":"forward","step":true,"micro_batch":0,"op":"aten.mm","module":"head"}',
        '{"memscope":1,"number":1,"phase":"fore","step":0,"micro_batch":0,"op":"aten.mm","module":"head"}',
        '{"memscope":1,"category":' + "[" * 9_900,
    ],
)
def test_a_text_that_is_no_label_is_ignored(imported, text):
    history = [entry("alloc", BASE, 512, user_metadata=text), entry("annotate", BASE, 512, user_metadata=text)]
    trace = imported(snapshot([segment(block(512), block(2 * MIB - 512, "inactive"))], history))
    assert trace.meta["inferred"] == [*INFERRED]
    assert len(trace) == 1


def test_a_label_of_a_block_that_is_not_there_is_ignored(imported):
    script = Script()
    with script.op("aten.mm.default", "head"):
        script.storage(script.alloc(BASE, 512), 512, "activation")
    stray = entry("annotate", BASE + MIB, 512, user_metadata='{"memscope":1,"category":"gradient","module":"head"}')
    history = [*({"frames": [], **one} for one in script.entries), stray]
    trace = imported(snapshot([segment(block(512), block(2 * MIB - 512, "inactive"))], history))
    assert "gradient" not in categories(trace)
