"""Memory snapshots of PyTorch, built by hand or from histories that its own allocator wrote."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from memscope.allocator.recorded import Memory, RecordedBlocks, read_blocks
from memscope.allocator.settings import AllocatorSettings
from memscope.trace import CATEGORIES, Trace

__all__ = [
    "FORWARD", "GOLDEN", "MODULE_CALL", "Golden", "came_of", "categories", "dumped", "entry", "frame", "golden",
    "notes", "segments_at_end", "snapshot",
]  # fmt: skip

GOLDEN = [
    (path, number)
    for path in sorted((Path(__file__).parent / "golden").glob("allocator-torch-*.npz"))
    for number in range(9)
]
Entry = dict[str, Any]


def frame(name: str, filename: str = "train.py", line: int = 1) -> Entry:
    return {"name": name, "filename": filename, "line": line}


MODULE_CALL = frame("_call_impl", "/x/torch/nn/modules/module.py", 1751)
FORWARD = (frame("forward", "/m/model.py", 12), MODULE_CALL, frame("<module>", "/m/train.py", 40))
"""The stack of an allocation in a forward pass, innermost frame first."""


def entry(action: str, address: int, size: int, *frames: Entry, **more: Any) -> Entry:
    """An entry of a history, as PyTorch 2.13 writes it (`trace_entry` in torch/csrc/cuda/Module.cpp)."""
    where = {"device_free": address} if action == "oom" else {"addr": address}
    return {"action": action, **where, "size": size, "stream": 0, "frames": list(frames), "time_us": 0, **more}


def snapshot(segments: list[Entry], *traces: list[Entry], conf: str = "", **more: Any) -> Entry:
    """A snapshot in the layout of PyTorch 2.4 and later, `traces` by device."""
    settings = {"PYTORCH_CUDA_ALLOC_CONF": conf}
    return {
        "segments": segments,
        "device_traces": list(traces),
        "allocator_settings": settings,
        "external_annotations": [],
        **more,
    }


def dumped(data: Any, folder: Path, protocol: int = 4) -> Path:
    """The file of a snapshot, as `torch.cuda.memory._dump_snapshot` writes it."""
    path = folder / "snapshot.pickle"
    path.write_bytes(pickle.dumps(data, protocol))
    return path


class Golden:
    """A history that PyTorch's own allocator wrote, and its statistics; see tests/golden.

    Attributes:
        entries: the entries of `device_traces`.
        totals: allocated, active, reserved and requested bytes after each birth and each completed free `[events, 4]`.
    """

    def __init__(self, path: Path, number: int) -> None:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            rows, self.totals = file[f"trace_{number}"].tolist(), file[f"totals_{number}"]
        self.conf: str = about["cases"][number]["settings"]
        self.entries = [entry(about["actions"][action], address, size) for action, address, size, _ in rows]

    @property
    def blocks(self) -> RecordedBlocks:
        return read_blocks([], self.entries, AllocatorSettings.parse(self.conf))


def golden(path: Path, number: int) -> Golden:
    return Golden(path, number)


def segments_at_end(known: Golden) -> list[Entry]:
    """The segments at the end of a history that began with an empty allocator."""
    memory, blocks = Memory(), known.blocks
    states = {"free_requested": "active_pending_free", "free_completed": "", "alloc": "active_allocated"}
    state: dict[int, str] = {}
    for about in known.entries:
        action = about["action"]
        if action in ("segment_alloc", "segment_map"):
            memory.hold(about["addr"], about["size"], grows=action == "segment_map")
        elif action in ("segment_free", "segment_unmap"):
            memory.give_back(about["addr"], about["size"])
        elif action in states:
            state[about["addr"]] = states[action]
    last = {int(address): row for row, address in enumerate(blocks.address)}
    segments = []
    for start, end, grows in memory.ranges():
        parts, at = [], start
        for address in sorted(a for a, is_taken in state.items() if is_taken and start <= a < end):
            row = last[address]
            size, requested = int(blocks.size[row]), int(blocks.requested[row])
            parts.append({"size": address - at, "state": "inactive"})
            parts.append({"size": size, "requested_size": requested, "state": state[address], "frames": []})
            at = address + size
        parts.append({"size": end - at, "state": "inactive"})
        segments.append(
            {"device": 0, "address": start, "total_size": end - start, "is_expandable": grows, "blocks": parts}
        )
    return segments


def notes(trace: Trace) -> list[str]:
    """The notes of an import on values that are not exact."""
    told: list[str] = trace.meta["imported"]["notes"]
    return told


def categories(trace: Trace) -> list[str]:
    """The category of each allocation."""
    return [CATEGORIES[code] for code in trace.category]


def came_of(conf: str, **values: Any) -> dict[str, Any]:
    """`allocator_settings` as PyTorch 2.3 and later write them: the text, and the parsed values (cuda/Module.cpp)."""
    divisions = {str(2**number): values.get("divisions", 0) for number in range(16)}
    return {
        "PYTORCH_CUDA_ALLOC_CONF": conf,
        "max_split_size": values.get("max_split_size", -1),
        "garbage_collection_threshold": 0.0,
        "expandable_segments": values.get("expandable_segments", False),
        "pinned_num_register_threads": 1,
        "release_lock_on_cudamalloc": False,
        "pinned_use_cuda_host_register": False,
        "roundup_power2_divisions": divisions,
    }
