"""Histories recorded on GPUs, replayed to the byte: every block, every segment, every peak.

`make gpu` writes them, and `benchmarks/golden_from_snapshot.py` makes them from memory snapshots that others published.
Each file names its source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memscope.allocator.history import History, first_difference, read_history
from memscope.allocator.replay import Replay, replay
from memscope.allocator.settings import AllocatorSettings

GOLDEN = Path(__file__).parents[1] / "golden"


def about(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["about"]))  # type: ignore[no-any-return]


FROM_A_GPU = [path for path in sorted(GOLDEN.rglob("*.npz")) if about(path).get("device", "CPU") != "CPU"]


def replayed(path: Path) -> tuple[History, Replay, dict[str, Any]]:
    known = about(path)
    with np.load(path, allow_pickle=False) as file:
        rows = file["trace_0"].tolist()
    entries = [
        {"action": known["actions"][action], "addr": address, "size": size, "stream": stream}
        for action, address, size, stream in rows
    ]
    history = read_history(entries)
    done = replay(
        history.sizes,
        history.born,
        history.freed,
        streams=history.streams,
        settings=AllocatorSettings.parse(known["cases"][0]["settings"]),
        cache_emptied=history.given_back,
        segment_addresses=history.segment_addresses if known["driver_addresses"] else None,
    )
    return history, done, known["measured"]


@pytest.mark.parametrize("path", FROM_A_GPU, ids=lambda path: path.stem)
def test_a_replay_matches_the_gpu(path: Path) -> None:
    history, done, measured = replayed(path)
    assert first_difference(history, done) is None
    start = max(about(path).get("began", 0) - 1, 0)  # the events before recording began were not recorded
    peaks = {
        "allocated": int(done.allocated[start:].max()),
        "reserved": done.peak_reserved,
        "requested": int(done.requested[start:].max()),
    }
    told = {name: measured[name] for name in peaks if name in measured}  # no requested bytes if blocks existed before
    assert told == {name: peaks[name] for name in told}


def test_a_changed_history_gives_differences(tmp_path: Path) -> None:
    # Two blocks in one segment by the rules, then the second one moved: the test above would report it.
    rows = [[1, 0x7000000, 20 * 2**20, 0], [0, 0x7000000, 3 * 2**20, 0], [0, 0x7400000, 2 * 2**20, 0]]
    known = {
        "actions": ["alloc", "segment_alloc"],
        "device": "a GPU",
        "driver_addresses": True,
        "measured": {},
        "cases": [{"settings": ""}],
    }
    path = tmp_path / "golden.npz"
    np.savez_compressed(path, about=np.array(json.dumps(known)), trace_0=np.array(rows, dtype=np.int64))
    history, done, _ = replayed(path)
    assert str(first_difference(history, done)).startswith("event 1: PyTorch used the block at 0x7400000")
