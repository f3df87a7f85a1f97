"""Golden histories from other people's snapshots: added entries lead to the state when recording began."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from histories import BASE, MIB, block, segment
from snapshots import entry, snapshot

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from golden_from_snapshot import golden_of

from memscope.allocator.history import first_difference, read_history
from memscope.allocator.replay import replay
from memscope.errors import UsageError

SMALL = BASE - 64 * MIB
LARGE = BASE + 64 * MIB
WEIGHT = 3 * MIB


def begun_late() -> dict[str, Any]:
    """Three segments; 4 MiB were allocated in the gap of 6 MiB, and the 2 MiB after it were freed."""
    segments = [
        segment(block(WEIGHT), block(4 * MIB), block(4 * MIB, "inactive"), block(2 * MIB), block(7 * MIB, "inactive")),
        segment(block(512), block(MIB + 512, "inactive"), block(1024), block(MIB - 2048, "inactive"), address=SMALL),
        segment(block(30 * MIB), block(34 * MIB, "inactive"), address=LARGE),
    ]
    return snapshot(
        segments,
        [
            entry("alloc", BASE + WEIGHT, 4 * MIB),
            entry("free_requested", BASE + 9 * MIB, 2 * MIB),
            entry("free_completed", BASE + 9 * MIB, 2 * MIB),
        ],
    )


def test_the_added_entries_lead_to_the_state_when_recording_began() -> None:
    entries, about = golden_of(begun_late(), 0)
    history = read_history(entries)
    done = replay(
        history.sizes,
        history.born,
        history.freed,
        cache_emptied=history.given_back,
        segment_addresses=history.segment_addresses,
    )
    assert first_difference(history, done) is None
    began = done.snapshots([about["began"] - 1])[about["began"] - 1]
    blocks = [[(part.size_bytes, part.allocated) for part in held.blocks] for held in began.segments]
    assert blocks == [
        [(512, True), (MIB + 512, False), (1024, True), (MIB - 2048, False)],
        [(WEIGHT, True), (6 * MIB, False), (2 * MIB, True), (2 * MIB, True), (7 * MIB, False)],
        [(30 * MIB, True), (34 * MIB, False)],
    ]


def test_peaks_are_those_since_recording_began() -> None:
    # Before: 3 + 2 + 2 + 30 MiB and 1.5 KiB; then 4 MiB more, then 2 less. The added entries filled all 86 MiB.
    _, about = golden_of(begun_late(), 0)
    most = 41 * MIB + 1536
    assert about["measured"] == {"allocated": most, "reserved": 86 * MIB}


def test_a_history_that_ran_out_of_memory_is_refused() -> None:
    data = begun_late()
    data["device_traces"][0].append(entry("oom", 0, 90 * MIB))
    with pytest.raises(UsageError, match="runs out of memory"):
        golden_of(data, 0)


def test_a_free_that_waits_for_a_stream_is_refused() -> None:
    data = begun_late()
    data["device_traces"][0].append(entry("free_requested", LARGE, 30 * MIB))
    data["segments"][2]["blocks"][0]["state"] = "active_pending_free"
    with pytest.raises(UsageError, match="wait for a stream"):
        golden_of(data, 0)


def test_a_history_with_entries_left_out_is_refused() -> None:
    data = begun_late()
    data["device_traces"][0].append(entry("alloc", BASE + WEIGHT, 4 * MIB))
    with pytest.raises(UsageError, match=r"incomplete: frees missing from the history: 1;"):
        golden_of(data, 0)


def test_segments_that_had_grown_before_are_refused() -> None:
    data = begun_late()
    data["segments"][0]["is_expandable"] = True
    with pytest.raises(UsageError, match="begins with expandable segments"):
        golden_of(data, 0)
