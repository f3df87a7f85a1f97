"""Traces from memory snapshots of PyTorch: complete or begun late, with notes on values that are not exact."""

import json

import numpy as np
import pytest
from histories import BASE, MIB, block, segment
from snapshots import GOLDEN, Golden, came_of, entry, frame, notes, segments_at_end, snapshot

from memscope.errors import TraceFileError
from memscope.exchange.torch_reader import INFERRED
from memscope.trace import CATEGORIES, PHASES, Trace

# Sizes, lifetimes and reserved memory equal those of PyTorch's allocator.


def counted(known):
    """Allocated, reserved and requested bytes that PyTorch counted after each birth and free."""
    return known.totals[:, [0, 2, 3]]


@pytest.mark.parametrize(("path", "number"), GOLDEN, ids=lambda value: getattr(value, "stem", value))
def test_a_whole_history_gives_every_byte_as_pytorch_counted_it(imported, path, number):
    known = Golden(path, number)
    trace = imported(snapshot(segments_at_end(known), known.entries, conf=known.conf))
    change = np.zeros(trace.events, dtype=np.int64)
    freed = trace.freed >= 0
    change[trace.born], change[trace.freed[freed]] = trace.requested, -trace.requested[freed]
    ours = np.stack([trace.allocated, trace.reserved, change.cumsum()], axis=1)
    assert np.array_equal(ours[: len(known.totals)], counted(known))
    assert trace.meta["size_differences"] == 0
    assert trace.meta["peak_reserved"] == known.blocks.peak_reserved


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("path", "number"), GOLDEN, ids=lambda value: getattr(value, "stem", value))
def test_a_history_begun_late_continues_as_the_whole_one(imported, path, number, share):
    known = Golden(path, number)
    cut = int(share * len(known.entries))
    trace = imported(snapshot(segments_at_end(known), known.entries[cut:], conf=known.conf))
    whole = imported(snapshot(segments_at_end(known), known.entries, conf=known.conf))
    events = sum(about["action"] in ("alloc", "free_requested") for about in known.entries[cut:])
    assert np.array_equal(trace.reserved[-events:], whole.reserved[-events:])
    less = whole.allocated[-events:] - trace.allocated[-events:]
    guessed = sum("allocated before the history began" in note for note in notes(trace))
    assert not any("does not match" in note for note in notes(trace))
    assert (less == 0).all() or guessed, "all sizes are known, so all are exact"
    assert (less == 0).all() or "max_split_size_mb" in known.conf, "the blocks after them show their sizes"
    assert less[-1] == 0, "live blocks at the end have the size in the snapshot"
    assert (less >= 0).all()


def test_a_block_from_before_the_history_is_born_at_its_start_with_its_size(imported):
    here = segment(block(2 * MIB, requested=2 * MIB - 100), block(18 * MIB, "inactive"))
    trace = imported(snapshot([here], [entry(a, BASE + 2 * MIB, 512) for a in ("alloc", "free_requested")]))
    assert trace.size.tolist() == [2 * MIB, 512]
    assert trace.requested.tolist() == [2 * MIB - 100, 512]
    assert trace.born.tolist() == [0, 1]
    assert trace.freed.tolist() == [-1, 2]
    assert PHASES[trace.phase[0]] == "setup"
    assert trace.step[0] == -1


def test_the_size_of_an_earlier_block_that_was_freed_is_marked_as_a_guess(imported):
    empty = segment(block(20 * MIB, "inactive"))
    freed = [entry("free_requested", BASE, 2 * MIB - 100), entry("free_completed", BASE, 2 * MIB - 100)]
    trace = imported(snapshot([empty], freed))
    assert trace.size.tolist() == [2 * MIB]
    assert trace.allocated.tolist() == [2 * MIB, 0]
    assert [note for note in notes(trace) if "and freed in it: 1 (2.00 MiB)" in note]


@pytest.mark.parametrize(("behind", "expected"), [(MIB, 3 * MIB), (MIB + 512, 2 * MIB)])
def test_a_gap_too_small_for_a_block_belongs_to_the_block_before_it(imported, behind, expected):
    # A rest of up to 1 MiB is not split off a large block; the next block is from before the history.
    here = segment(block(2 * MIB + behind, "inactive"), block(3 * MIB), block(15 * MIB - behind, "inactive"))
    freed = [entry("free_requested", BASE, 2 * MIB - 100), entry("free_completed", BASE, 2 * MIB - 100)]
    assert imported(snapshot([here], freed)).size.tolist() == [expected, 3 * MIB]


@pytest.mark.parametrize(("while_there", "expected"), [(True, 2 * MIB + 512 * 1024), (False, 2 * MIB)])
def test_a_block_after_an_earlier_one_shows_where_that_ended(imported, while_there, expected):
    end = segment(block(2 * MIB + 512 * 1024, "inactive"), block(3 * MIB), block(14 * MIB + 512 * 1024, "inactive"))
    freed = [entry("free_requested", BASE, 2 * MIB), entry("free_completed", BASE, 2 * MIB)]
    put = [entry("alloc", BASE + 2 * MIB + 512 * 1024, 3 * MIB)]
    trace = imported(snapshot([end], put + freed if while_there else freed + put))
    assert trace.size.tolist() == [expected, 3 * MIB]


def test_an_earlier_block_ends_at_the_latest_with_its_segment(imported):
    # A segment of 2 MiB follows at once, with a block at offset 512.
    large = segment(block(10 * MIB, "inactive"))
    small = segment(block(512, "inactive"), block(512), block(2 * MIB - 1024, "inactive"), address=BASE + 10 * MIB)
    freed = [entry("free_requested", BASE, 10 * MIB - 4096), entry("free_completed", BASE, 10 * MIB - 4096)]
    assert imported(snapshot([large, small], freed)).size.tolist() == [10 * MIB, 512]


def test_nothing_was_split_off_blocks_that_max_split_size_forbids_to_split(imported):
    freed = [entry("free_requested", BASE, 30 * MIB), entry("free_completed", BASE, 30 * MIB)]
    data = snapshot([segment(block(40 * MIB, "inactive"))], freed, conf="max_split_size_mb:24")
    assert imported(data).size.tolist() == [40 * MIB]


def test_segments_that_came_and_went_are_followed_backwards(imported):
    # One segment of 20 MiB at the end. Before, there was also one of 2 MiB, and the large one was taken later.
    end = segment(block(20 * MIB, "inactive"), address=BASE + 64 * MIB)
    history = [
        entry("segment_alloc", BASE + 64 * MIB, 20 * MIB),
        entry("alloc", BASE + 64 * MIB, 3 * MIB),
        entry("segment_free", BASE, 2 * MIB),
        entry("free_requested", BASE + 64 * MIB, 3 * MIB),
        entry("free_completed", BASE + 64 * MIB, 3 * MIB),
    ]
    trace = imported(snapshot([end], history))
    assert trace.reserved.tolist() == [22 * MIB, 20 * MIB]
    assert trace.meta["peak_reserved"] == 22 * MIB


def test_pages_of_an_expandable_segment_are_followed_backwards(imported):
    end = segment(block(2 * MIB), block(38 * MIB, "inactive"), expandable=True)
    history = [
        entry("segment_map", BASE + 20 * MIB, 20 * MIB),
        entry("segment_unmap", BASE + 40 * MIB, 20 * MIB),
        entry("alloc", BASE, 2 * MIB),
    ]
    trace = imported(snapshot([end], history, conf="expandable_segments:True"))
    assert trace.reserved.tolist() == [40 * MIB]
    assert trace.meta["peak_reserved"] == 60 * MIB


def test_a_block_that_another_stream_still_uses_is_dead(imported):
    waits = segment(block(2 * MIB, "active_awaiting_free"), block(18 * MIB, "inactive"))
    trace = imported(snapshot([waits], [entry("alloc", BASE, 2 * MIB), entry("free_requested", BASE, 2 * MIB)]))
    assert trace.allocated.tolist() == [2 * MIB, 0]
    assert notes(trace) == [
        "the snapshot has no stacks (recorded without context), so the purpose of memory is unknown"
    ]


@pytest.mark.parametrize("skipped", ["free_requested", "free_completed"])
def test_a_free_with_only_one_of_its_two_entries_is_a_free(imported, skipped):
    history = [entry(a, BASE, 2 * MIB) for a in ("alloc", "free_requested", "free_completed") * 2 if a != skipped]
    trace = imported(snapshot([segment(block(20 * MIB, "inactive"))], history))
    assert trace.allocated.tolist() == [2 * MIB, 0, 2 * MIB, 0]


def test_memory_allocated_twice_was_freed_in_between_and_the_trace_says_so(imported):
    history = [entry("alloc", BASE, 2 * MIB), entry("alloc", BASE, 2 * MIB)]
    trace = imported(snapshot([segment(block(2 * MIB), block(18 * MIB, "inactive"))], history))
    assert trace.allocated.tolist() == [2 * MIB, 0, 2 * MIB]
    assert notes(trace)[0].startswith("frees missing from the history: 1;")


def test_without_segment_entries_sizes_are_rounded_requests_and_the_trace_says_so(imported):
    history = [entry("alloc", BASE, 1000), entry("free_requested", BASE, 1000)]
    trace = imported(snapshot([], history))
    assert trace.size.tolist() == [1024]
    assert notes(trace)[0].startswith("the history does not match the segments")


def test_the_settings_of_the_allocator_decide_how_blocks_are_split(imported):
    # With expandable segments every rest from 512 bytes is split off, otherwise only one above 1 MiB.
    history = [entry("alloc", BASE, 19 * MIB + MIB // 2)]
    sizes = {}
    for conf in ("", "expandable_segments:True"):
        end = segment(block(20 * MIB), expandable=bool(conf))
        sizes[conf] = imported(snapshot([end], history, conf=conf)).size.tolist()
    assert sizes == {"": [20 * MIB], "expandable_segments:True": [19 * MIB + MIB // 2]}


def test_unknown_settings_are_reported(imported):
    trace = imported(snapshot([segment(block(20 * MIB, "inactive"))], [entry("alloc", BASE, 512)], conf="new_key:1"))
    assert 'unknown key "new_key"' in notes(trace)[0]


@pytest.mark.parametrize(
    ("values", "requested", "expected"),
    [
        ({}, 19 * MIB + MIB // 2, 20 * MIB),  # half a MiB is too little to be split off
        ({"expandable_segments": True}, 19 * MIB + MIB // 2, 19 * MIB + MIB // 2),  # except in expandable segments
        ({}, 6 * MIB + 1, 6 * MIB + 512),
        ({"divisions": 4}, 6 * MIB + 1, 7 * MIB),  # from 4 to 8 MiB in four steps
        ({"max_split_size": 40 * MIB}, 6 * MIB, 6 * MIB),
        ({"max_split_size": 20 * MIB}, 22 * MIB, 40 * MIB),  # a block from the limit on is not split
    ],
)
@pytest.mark.parametrize("conf", ["", "a_key_to_come:1"])
def test_parsed_settings_take_precedence_over_their_text(imported, conf, values, requested, expected):
    segment_bytes = 40 * MIB if requested > 20 * MIB else 20 * MIB
    rest = [block(segment_bytes - expected, "inactive")] if expected < segment_bytes else []
    data = snapshot([segment(block(expected, requested=requested), *rest)], [entry("alloc", BASE, requested)])
    trace = imported({**data, "allocator_settings": came_of(conf, **values)})
    assert trace.size.tolist() == [expected]
    assert trace.meta["size_differences"] == 0
    assert not any("key" in note for note in notes(trace))


# Out of memory.


def ran_out(*after):
    inside = [frame("forward", "/m/model.py", 7), frame("_call_impl", "/x/torch/nn/modules/module.py", 9)]
    history = [entry("alloc", BASE, 4 * MIB, *inside), entry("oom", 5 * MIB, 30 * MIB, *inside), *after]
    return snapshot([segment(block(4 * MIB), block(16 * MIB, "inactive"))], history)


def test_a_failed_request_is_recorded_with_the_memory_in_use(imported):
    oom = imported(ran_out()).meta["out_of_memory"]
    assert oom == {
        "event": 1,
        "step": 0,
        "micro_batch": 0,
        "phase": "forward",
        "module": "model",
        "op": "model.py:7 forward",
        "category": None,
        "requested": 30 * MIB,
        "allocated": 4 * MIB,
        "reserved": 20 * MIB,
        "largest_free": 16 * MIB,
        "limit": 25 * MIB,
        "by_category": {category: 4 * MIB * (category == "activation") for category in CATEGORIES},
    }


def test_a_failure_that_the_run_survived_is_not_recorded(imported):
    assert imported(ran_out(entry("alloc", BASE + 4 * MIB, 512))).meta["out_of_memory"] is None


# Damage.


def damaged(**changes):
    return {**snapshot([segment(block(2 * MIB))], [entry("alloc", BASE, 512)]), **changes}


DAMAGED = {
    "plain data of another kind": ({"epoch": 1}, "not a PyTorch memory snapshot"),
    "a number": (7, "not a PyTorch memory snapshot"),
    "nothing in it": (snapshot([]), "neither segments nor a history"),
    "history of no lists": (damaged(device_traces={}), "device_traces is not a list of lists"),
    "entry that is no dict": (damaged(device_traces=[[7]]), "entry 0 of device_traces has no action"),
    "action that is no word": (damaged(device_traces=[[{"action": 1}]]), "entry 0 of device_traces has no action"),
    "entry without address": (damaged(device_traces=[[{"action": "alloc", "size": 1}]]), "has no addr"),
    "size that is no number": (damaged(device_traces=[[entry("alloc", BASE, "1")]]), "size of entry 0"),
    "size below zero": (damaged(device_traces=[[entry("alloc", BASE, -1)]]), "is not a number of bytes"),
    "address past 64 bits": (damaged(device_traces=[[entry("alloc", 2**63, 1)]]), "addr of entry 0"),
    "truth for a size": (damaged(device_traces=[[entry("alloc", BASE, True)]]), "size of entry 0"),
    "stack that is no list": (damaged(device_traces=[[{**entry("alloc", BASE, 1), "frames": {}}]]), "is not a list"),
    "frame that is no dict": (
        damaged(device_traces=[[{**entry("alloc", BASE, 1), "frames": [7]}]]),
        "frame of a stack",
    ),
    "segment without blocks": (damaged(segments=[{"device": 0, "address": 0, "total_size": 1}]), "no list of blocks"),
    "segment larger than its blocks": (
        damaged(segments=[{**segment(block(MIB)), "total_size": 2 * MIB}]),
        "has 2097152 bytes, but its blocks have 1048576",
    ),
    "block in an unknown state": (damaged(segments=[segment(block(MIB, "gone"))]), "in an unknown state"),
    "block asked for more than it has": (
        damaged(segments=[segment(block(1, requested=2))]),
        "is not from 0 to 1 bytes",
    ),
    "segment of no device": (damaged(segments=[{**segment(block(MIB)), "device": "cuda"}]), "has no valid device"),
    "settings that are none": (damaged(allocator_settings=[1]), "allocator_settings"),
    "settings of words": (
        damaged(allocator_settings={"roundup_power2_divisions": "none", "max_split_size": "none"}),
        "allocator_settings",
    ),
    "time that is infinite": (
        damaged(device_traces=[[entry("alloc", BASE, 512, time_us=float("inf"))]]),
        "time_us of entry 0 of device_traces is inf: expected a whole number",
    ),
    "annotation at no time": (
        damaged(external_annotations=[{"name": "x", "stage": "START", "device": 0, "time_us": float("nan")}]),
        "time_us of annotation 0 is nan: expected a whole number",
    ),
    "annotation in the list of actions at an infinite time": (
        {
            "segments": [],
            "device_traces": [[entry("user_defined", 0, 0, frame("START", "x"), time_us=-float("inf"))]],
        },
        "time_us of entry 0 of device_traces is -inf: expected a whole number",
    ),
    "segment listed twice": (
        damaged(segments=[segment(block(2 * MIB))] * 2),
        f"segments 0 and 1 are both at address {BASE:#x} of GPU 0",
    ),
    "segments that overlap": (
        damaged(segments=[segment(block(MIB), address=BASE + MIB), segment(block(2 * MIB))]),
        f"segments 1 and 0 of GPU 0 overlap at address {BASE + MIB:#x}",
    ),
    "annotations that are none": (damaged(external_annotations=7), "external_annotations is not a list"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_snapshot_is_refused_by_file_name(imported, tmp_path, name):
    data, expected = DAMAGED[name]
    with pytest.raises(TraceFileError, match=expected) as error:
        imported(data)
    assert str(tmp_path / "snapshot.pickle") in str(error.value)


def test_a_history_that_reserves_the_same_memory_twice_is_told_from_the_segments(imported):
    # A segment that exists at the end was returned and never reserved again: before the history, it was there twice.
    history = [entry("segment_free", BASE, 2 * MIB), entry("alloc", BASE, 512), entry("segment_free", BASE, 2 * MIB)]
    trace = imported(snapshot([segment(block(512), block(2 * MIB - 512, "inactive"))], history))
    assert any("the history does not match the segments" in note for note in notes(trace))


def test_stacks_whose_frames_share_lists_without_end_are_not_compared(imported):
    def endless():
        found = [1, 1]
        for _ in range(60):
            found = [found, found]
        return found

    # Equal, but not the same object: comparing them would compare 2^60 numbers.
    shared, stacks = frame("f"), [{**frame("g"), "line": endless()} for _ in range(2)]
    entries = [entry("alloc", BASE + n * 512, 512, shared, stacks[n]) for n in range(2)]
    trace = imported(snapshot([segment(block(512), block(512))], entries))
    assert trace.size.tolist() == [512, 512]


# Metadata of the trace.


def test_inferred_columns_are_marked_and_the_trace_is_saved_like_any_other(imported, tmp_path):
    known = Golden(*GOLDEN[0])
    trace = imported(snapshot(segments_at_end(known), known.entries, conf=known.conf))
    assert trace.meta["inferred"] == list(INFERRED) == ["category", "module", "op", "phase", "step", "micro_batch"]
    again = Trace.load(trace.save(tmp_path / "trace.npz"))
    assert again.by_category() == trace.by_category()
    assert json.loads(json.dumps(trace.meta)) == trace.meta


def test_an_imported_trace_has_a_ledger_up_to_reserved_and_says_why_it_stops_there(imported):
    from memscope.analysis.ledger import ledger

    found = ledger(imported(snapshot([segment(block(2 * MIB, requested=MIB), block(18 * MIB, "inactive"))])))
    assert [(line.name, line.total) for line in found.lines] == [
        ("requested", MIB),
        ("allocated", 2 * MIB),
        ("reserved", 20 * MIB),
    ]
    assert "a snapshot does not contain it" in found.note
