"""Replays compared with PyTorch's own allocator, to the byte.

`tests/golden/*allocator-torch-*.npz` were recorded from the compiled allocator of PyTorch releases; each file says how.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from memscope.allocator.history import History, first_difference, read_history
from memscope.allocator.replay import Replay, replay
from memscope.allocator.settings import AllocatorSettings
from memscope.errors import TraceFileError

GOLDEN = Path(__file__).parents[1] / "golden"
MIB = 2**20
Entry = dict[str, Any]


class Case(NamedTuple):
    entries: list[Entry]
    totals: npt.NDArray[np.int64]
    """[events, 4]: allocated, active, reserved and requested bytes."""
    settings: AllocatorSettings
    capacity_bytes: int | None
    device_bytes: int


def case(release: str, number: int, *, version: str = "") -> Case:
    """One history of a release, with its settings, or with those settings in another version."""
    (path,) = GOLDEN.glob(f"*allocator-torch-{release}.npz")
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        rows, totals = file[f"trace_{number}"].tolist(), file[f"totals_{number}"]
    entries = [
        {"action": about["actions"][action], "addr": address, "size": size, "stream": stream}
        for action, address, size, stream in rows
    ]
    known = about["cases"][number]
    settings = AllocatorSettings.parse(f"version:{version or release},{known['settings']}".removesuffix(","))
    return Case(entries, totals, settings, known["capacity_bytes"], known["device_bytes"])


def replay_of(history: History, known: Case, *, driver_addresses: bool) -> Replay:
    return replay(
        history.sizes,
        history.born,
        history.freed,
        streams=history.streams,
        settings=known.settings,
        capacity_bytes=known.capacity_bytes,
        device_bytes=known.device_bytes,
        cache_emptied=history.cache_emptied if known.capacity_bytes else history.given_back,
        segment_addresses=history.segment_addresses if driver_addresses else None,
    )


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("release", ["2.13.0", "2.12.1", "2.11.0", "2.4.1"])
def test_blocks_and_segments_lie_where_pytorch_put_them(release: str, number: int) -> None:
    known = case(release, number)
    history = read_history(known.entries)
    done = replay_of(history, known, driver_addresses=release in ("2.11.0", "2.4.1"))
    assert first_difference(history, done) is None
    assert (done.oom is not None) == (known.entries[-1]["action"] == "oom")
    totals = np.stack([done.allocated, done.active, done.reserved, done.requested], axis=1)
    assert (totals == known.totals).all()


@pytest.mark.parametrize(("release", "number", "driver_addresses"), [("2.12.1", 0, False), ("2.4.1", 6, True)])
def test_the_rules_of_another_release_give_differences(release: str, number: int, driver_addresses: bool) -> None:
    # 2.12 takes the oldest of equal blocks; in 2.4 the `>` of [1:8,2:2,4:4,>:1] replaces the divisions from 4 MiB too.
    known = case(release, number)
    newer = case(release, number, version="2.13").settings
    history = read_history(known.entries)
    other = replay_of(history, known._replace(settings=newer), driver_addresses=driver_addresses)
    assert "PyTorch used the block at" in str(first_difference(history, other))


def test_a_reached_limit_can_be_replayed_without_knowing_it() -> None:
    known = case("2.13.0", 8)
    history = read_history(known.entries)
    assert history.given_back, "in this history the limit was never reached"
    assert not history.cache_emptied
    assert (
        first_difference(history, replay_of(history, known._replace(capacity_bytes=None), driver_addresses=False))
        is None
    )


def test_other_settings_give_differences() -> None:
    # With pages instead of segments, the first memory taken already differs.
    known = case("2.13.0", 0)
    history = read_history(known.entries)
    other = replay_of(
        history,
        known._replace(settings=AllocatorSettings(expandable_segments=True, version="2.13")),
        driver_addresses=False,
    )
    assert str(first_difference(history, other)).startswith("event 0: PyTorch did a segment_alloc of")


def entry(action: str, address: int, size: int, stream: int = 0) -> Entry:
    return {"action": action, "addr": address, "size": size, "stream": stream, "time_us": 1, "frames": []}


# By the rules: 3 and 2 MiB side by side in a segment of 20, then 1 MiB in one of 2.
SHORT = [
    entry("segment_alloc", 0x7000000, 20 * MIB),
    entry("alloc", 0x7000000, 3 * MIB),
    entry("alloc", 0x7000000 + 3 * MIB, 2 * MIB),
    entry("free_requested", 0x7000000, 3 * MIB),
    entry("free_completed", 0x7000000, 3 * MIB),
    entry("segment_alloc", 0x5000000, 2 * MIB),
    entry("alloc", 0x5000000, MIB),
]


def short_replay(entries: list[Entry], capacity_bytes: int | None = None) -> tuple[History, Replay]:
    history = read_history(entries)
    return history, replay(history.sizes, history.born, history.freed, capacity_bytes=capacity_bytes)


def test_a_history_is_read_into_columns() -> None:
    history = read_history(SHORT)
    assert history.sizes.tolist() == [3 * MIB, 2 * MIB, MIB]
    assert history.born.tolist() == [0, 1, 3]
    assert history.freed.tolist() == [2, -1, -1]
    assert history.segment_addresses == {0: 0x7000000, 3: 0x5000000}
    assert first_difference(*short_replay(SHORT)) is None


def test_a_block_elsewhere_in_its_segment_is_a_difference() -> None:
    moved = [*SHORT]
    moved[2] = entry("alloc", 0x7000000 + 4 * MIB, 2 * MIB)
    assert first_difference(*short_replay(moved)) == (
        "event 1: PyTorch used the block at 0x7400000, the replay the block at 0x7300000"
    )


def test_a_segment_of_another_size_is_a_difference() -> None:
    larger = [*SHORT]
    larger[5] = entry("segment_alloc", 0x5000000, 4 * MIB)
    assert first_difference(*short_replay(larger)) == (
        "event 3: PyTorch did a segment_alloc of 4194304 bytes on stream 0, "
        "the replay a segment_alloc of 2097152 bytes on stream 0"
    )


def test_another_segment_given_back_is_a_difference() -> None:
    # Two segments of 30 MiB, both unused; the cache is emptied, in the wrong order.
    entries = [entry("segment_alloc", 0x1000000, 30 * MIB), entry("alloc", 0x1000000, 30 * MIB)]
    entries += [entry("segment_alloc", 0x9000000, 30 * MIB), entry("alloc", 0x9000000, 30 * MIB)]
    entries += [entry("free_completed", 0x1000000, 30 * MIB), entry("free_completed", 0x9000000, 30 * MIB)]
    entries += [entry("segment_free", 0x9000000, 30 * MIB), entry("segment_free", 0x1000000, 30 * MIB)]
    history = read_history(entries)
    assert history.cache_emptied == (4,)
    done = replay(history.sizes, history.born, history.freed, cache_emptied=history.cache_emptied)
    assert first_difference(history, done) == "event 4: PyTorch released 0x9000000, the replay 0x1000000"


def test_running_out_of_memory_only_once_is_a_difference() -> None:
    failing = [*SHORT, entry("oom", 1000, 40 * MIB)]
    assert first_difference(*short_replay(failing, capacity_bytes=50 * MIB)) is None
    assert first_difference(*short_replay(failing)) == "event 4: PyTorch ran out of memory, the replay did not"
    assert first_difference(*short_replay(SHORT, capacity_bytes=21 * MIB)) == (
        "event 3: the replay ran out of memory, PyTorch did not"
    )


@pytest.mark.parametrize(
    ("entries", "because"),
    [(SHORT[1:], "its first allocation needed no segment"), (SHORT[3:], "frees the block at 0x7000000")],
)
def test_a_history_without_its_beginning_is_refused(entries: list[Entry], because: str) -> None:
    with pytest.raises(TraceFileError, match=f"{because}.*larger max_entries"):
        read_history(entries)
