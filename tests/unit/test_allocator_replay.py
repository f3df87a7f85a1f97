"""Replays of whole runs: their columns, and invariants of any run on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscope.allocator.replay import Replay, replay
from memscope.allocator.report import HeldSegments
from memscope.allocator.settings import AllocatorSettings
from memscope.trace import Ints

MIB = 2**20


class Run(NamedTuple):
    sizes: Ints
    born: Ints
    freed: Ints
    streams: Ints


def column(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def run_of(program: Sequence[tuple[int, int]]) -> Run:
    """A run from steps `(bytes, stream)`, and `(-k, 0)` to free the k-th live allocation, counted from 1 and modulo."""
    sizes: list[int] = []
    born: list[int] = []
    freed: list[int] = []
    streams: list[int] = []
    alive: list[int] = []
    event = 0
    for value, stream in program:
        if value >= 0:
            alive.append(len(sizes))
            sizes.append(value)
            born.append(event)
            freed.append(-1)
            streams.append(stream)
        elif alive:
            freed[alive.pop(-value % len(alive))] = event
        else:
            continue
        event += 1
    return Run(column(sizes), column(born), column(freed), column(streams))


def replayed(run: Run, text: str = "", capacity_mib: int | None = None) -> Replay:
    return replay(
        run.sizes,
        run.born,
        run.freed,
        streams=run.streams,
        settings=AllocatorSettings.parse(text),
        capacity_bytes=None if capacity_mib is None else capacity_mib * MIB,
    )


def test_each_event_has_its_totals() -> None:
    # 3 MiB: a segment of 20. 1000 B: one of 2, block 1024. The 3 MiB are freed, but no segment. 40 MiB: one of 40.
    done = replayed(run_of([(3 * MIB, 0), (1000, 0), (-2, 0), (40 * MIB, 0)]))
    assert done.block_sizes.tolist() == [3 * MIB, 1024, 40 * MIB]
    assert done.allocated.tolist() == [3 * MIB, 3 * MIB + 1024, 1024, 40 * MIB + 1024]
    assert done.requested.tolist() == [3 * MIB, 3 * MIB + 1000, 1000, 40 * MIB + 1000]
    assert done.reserved.tolist() == [20 * MIB, 22 * MIB, 22 * MIB, 62 * MIB]
    assert done.largest_free.tolist() == [17 * MIB, 17 * MIB, 20 * MIB, 20 * MIB]
    assert (done.peak_allocated, done.peak_reserved) == (40 * MIB + 1024, 62 * MIB)
    assert [event.event for event in done.segment_events] == [0, 1, 3]
    assert done.oom is None
    assert done.failed_allocation is None


def test_an_empty_tensor_has_an_event_and_no_block() -> None:
    done = replayed(run_of([(0, 0), (512, 0), (-2, 0)]))
    assert done.block_sizes.tolist() == [0, 512]
    assert done.addresses[0] == -1
    assert done.allocated.tolist() == [0, 512, 512]
    assert done.segment_events[0].event == 1


def test_a_run_without_allocations_has_no_events_and_no_peak() -> None:
    done = replayed(run_of([]))
    assert (done.peak_allocated, done.peak_reserved, len(done.allocated)) == (0, 0, 0)


def test_the_replay_ends_where_memory_runs_out() -> None:
    # 30 + 12 of 50 MiB are in use; 5 more need a segment of 20. The replay ends there.
    done = replayed(run_of([(30 * MIB, 0), (12 * MIB, 0), (5 * MIB, 0), (-1, 0), (512, 0)]), capacity_mib=50)
    assert done.oom is not None
    assert (done.oom.event, done.failed_allocation) == (2, 2)
    assert (done.oom.requested_bytes, done.oom.segment_bytes) == (5 * MIB, 20 * MIB)
    assert done.block_sizes.tolist() == [30 * MIB, 12 * MIB, 0, 0]
    assert done.allocated.tolist() == [30 * MIB, 42 * MIB]
    assert len(done.reserved) == len(done.requested) == len(done.largest_free) == 2


def test_snapshots_show_the_blocks_after_the_events_asked_for() -> None:
    done = replayed(run_of([(3 * MIB, 0), (2 * MIB, 0), (-2, 0)]))
    taken = done.snapshots([1, 2])
    assert [blocks_of(taken[event]) for event in (1, 2)] == [
        [(3 * MIB, True), (2 * MIB, True), (15 * MIB, False)],
        [(3 * MIB, False), (2 * MIB, True), (15 * MIB, False)],
    ]
    assert taken[2].unreleasable_bytes == 18 * MIB
    with pytest.raises(ValueError, match="no event 3 in a replay of events 0 to 2"):
        done.snapshots([3])


def blocks_of(snapshot: HeldSegments) -> list[tuple[int, bool]]:
    return [(b.size_bytes, b.allocated) for segment in snapshot.segments for b in segment.blocks]


def test_the_cache_is_emptied_before_the_events_named() -> None:
    run = run_of([(40 * MIB, 0), (-1, 0), (30 * MIB, 0)])
    emptied = replay(run.sizes, run.born, run.freed, cache_emptied=[2, 3])
    assert emptied.reserved.tolist() == [40 * MIB, 40 * MIB, 30 * MIB]
    assert [(event.event, event.action) for event in emptied.segment_events] == [
        (0, "segment_alloc"),
        (2, "segment_free"),
        (2, "segment_alloc"),
    ]


def test_segments_lie_where_the_driver_put_them() -> None:
    done = replay(
        column([30 * MIB, 40 * MIB]), column([0, 1]), column([-1, -1]), segment_addresses={0: 2**40, 1: 2**39}
    )
    assert done.addresses.tolist() == [2**40, 2**39]


def test_a_run_that_departs_from_the_drivers_history_keeps_its_segments_apart() -> None:
    # A segment that the driver got back before event 1 is still held here, and event 1 received the same addresses.
    for address in (2**40, 2**40 + 20 * MIB, 2**40 - 20 * MIB):
        done = replay(
            column([30 * MIB, 40 * MIB]),
            column([0, 1]),
            column([-1, 2]),
            cache_emptied=[3],
            segment_addresses={0: 2**40, 1: address},
        )
        assert done.addresses[0] == 2**40
        assert done.addresses[1] != address
        assert done.reserved.tolist() == [30 * MIB, 70 * MIB, 70 * MIB]


@pytest.mark.parametrize(
    ("sizes", "born", "freed", "message"),
    [
        ([512, 512], [0, 0], [-1, -1], "2 births and frees are not numbered 0 to 1, each once"),
        ([512], [1], [-1], "1 births and frees are not numbered 0 to 0"),
        ([512], [1], [0], "allocation 0 is freed before it is made"),
        ([-512], [0], [-1], "allocation 0 has -512 bytes"),
        ([512], [0, 1], [-1], "1 sizes, 2 births, 1 frees"),
    ],
)
def test_columns_that_are_not_a_sequence_of_events_are_refused(
    sizes: list[int], born: list[int], freed: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replay(column(sizes), column(born), column(freed))


SIZES = st.one_of(
    st.integers(0, 5000),
    st.integers(MIB - 1024, MIB + 1024),
    st.integers(1, 12 * MIB),
    st.sampled_from([10 * MIB - 512, 10 * MIB, 19 * MIB, 20 * MIB + 1, 33 * MIB, 64 * MIB]),
)
PROGRAMS = st.lists(
    st.one_of(st.tuples(SIZES, st.integers(0, 2)), st.tuples(st.integers(-9, -1), st.just(0))), min_size=1, max_size=60
)
SETTINGS = st.sampled_from(
    [
        "",
        "expandable_segments:True",
        "max_split_size_mb:24",
        "expandable_segments:True,max_split_size_mb:24",
        "roundup_power2_divisions:4",
        "garbage_collection_threshold:0.4,per_process_memory_fraction:0.9",
    ]
)
CAPACITIES = st.sampled_from([None, 60, 150, 400])


@settings(deadline=None)
@given(program=PROGRAMS, text=SETTINGS, capacity_mib=CAPACITIES)
def test_the_totals_of_any_run_are_consistent(
    program: list[tuple[int, int]], text: str, capacity_mib: int | None
) -> None:
    run = run_of(program)
    done = replayed(run, text, capacity_mib)
    assert (done.requested <= done.allocated).all()
    assert (done.allocated <= done.reserved).all()
    assert (done.block_sizes % 512 == 0).all()
    assert done.peak_reserved <= (capacity_mib or 2**30) * MIB
    made = (done.addresses >= 0) & (run.sizes > 0)
    assert (done.block_sizes[made] >= run.sizes[made]).all()
    assert made.sum() == ((run.sizes > 0) & (run.born < len(done.allocated))).sum()
    again = replayed(run, text, capacity_mib)
    assert again.segment_events == done.segment_events
    assert again.oom == done.oom
    assert (again.addresses == done.addresses).all()


@settings(deadline=None)
@given(program=PROGRAMS, text=SETTINGS, capacity_mib=CAPACITIES)
def test_after_any_event_the_blocks_tile_the_segments(
    program: list[tuple[int, int]], text: str, capacity_mib: int | None
) -> None:
    run = run_of(program)
    done = replayed(run, text, capacity_mib)
    for event, snapshot in done.snapshots(range(len(done.allocated))).items():
        in_use = {}
        end = 0
        for segment in snapshot.segments:
            assert segment.address >= end, "segments overlap"
            end = segment.address
            was_cached = False
            for block in segment.blocks:
                assert block.address == end, "blocks overlap, or leave a gap"
                assert not (was_cached and not block.allocated), "free neighbours were not joined"
                was_cached, end = not block.allocated, end + block.size_bytes
                if block.allocated:
                    in_use[block.address] = block.size_bytes
            assert end == segment.address + segment.size_bytes
        alive = (run.sizes > 0) & (run.born <= event) & ((run.freed < 0) | (run.freed > event))
        assert in_use == dict(zip(done.addresses[alive].tolist(), done.block_sizes[alive].tolist(), strict=True))
        assert snapshot.free_bytes + sum(in_use.values()) == done.reserved[event]
        assert snapshot.largest_free_bytes == done.largest_free[event]
        assert 0 <= snapshot.unreleasable_bytes <= snapshot.free_bytes


@settings(deadline=None)
@given(program=PROGRAMS, text=SETTINGS)
def test_a_capacity_that_was_enough_changes_nothing(program: list[tuple[int, int]], text: str) -> None:
    if "fraction" in text:  # the limit is a fraction of the capacity
        return
    run = run_of(program)
    free = replayed(run, text)
    enough = replay(
        run.sizes,
        run.born,
        run.freed,
        streams=run.streams,
        settings=AllocatorSettings.parse(text),
        capacity_bytes=free.peak_reserved,
        device_bytes=2**40,
    )
    assert enough.oom is None
    assert (enough.reserved == free.reserved).all()
