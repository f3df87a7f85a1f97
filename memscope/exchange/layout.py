"""Conversion of all layouts of PyTorch's memory snapshots, old and new, into one.

Sources: `memorySnapshot` in torch/csrc/cuda/Module.cpp, `_snapshot` in torch/cuda/memory.py and `_block_extra_legacy`
in torch/cuda/_memory_viz.py; PyTorch 1.13 to 2.15.

    1.10  a list of segments, as torch.cuda.memory_snapshot() returns it
    1.13  {"segments": ..., "device_traces": ...}; a block's stack is in its "history"
    2.1   a block has "frames", "requested_size", "address"; segments may be "is_expandable"
    2.2   entries have "time_us"
    2.3   "allocator_settings": the text that was set, and the parsed values
    2.5   "external_annotations" (before, annotations are entries "user_defined")
    2.8   entries have "compile_context", by 2.11 "user_metadata", by 2.13 "pool_id"
    2.15  entries "annotate": a text about the live block at "addr", by 2.14 in the allocator

Unused fields are ignored: the pools and streams of segments and entries, and the fields that `augment_with_fx_traces`
adds to frames. Segments of all pools count as reserved, as in torch.cuda.memory_reserved.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from memscope.allocator.recorded import Entry
from memscope.errors import TraceFileError, excerpt

__all__ = ["SAYING_NOTHING", "Annotation", "Frames", "Snapshot", "bytes_of", "damaged", "read_layout", "whole"]

Frames = Sequence[Mapping[str, Any]]
"""A stack, innermost frame first; each frame has `name`, `filename` and `line`."""
SAYING_NOTHING = frozenset({"snapshot", "user_defined"})
"""Actions that do not change memory."""
_MOST_BYTES = 2**62
"""Upper bound on sizes and addresses, since a trace holds 64-bit integers and sums of them."""


@dataclass(frozen=True)
class Annotation:
    """Begin or end of a `torch.profiler.record_function` range."""

    name: str
    begins: bool
    time_us: int


@dataclass(frozen=True)
class Snapshot:
    """The content of a snapshot, independent of its layout."""

    segments: list[dict[str, Any]]
    """`device, address, total_size, stream, is_expandable, blocks`; blocks with `address, size, requested_size, state,
    frames`. Blocks leave no gaps. States are `active_allocated`, `active_pending_free`, `inactive`."""
    traces: list[list[Entry]]
    """By device, the allocator's actions, oldest first. Entries are not checked yet."""
    settings: Mapping[str, Any]
    """Settings of the allocator: the last `PYTORCH_CUDA_ALLOC_CONF`, and the parsed values by name."""
    annotations: dict[int, list[Annotation]]
    """By device, in order."""

    @property
    def devices(self) -> list[int]:
        """Devices with segments or a history. A snapshot may list further devices that the process did not use."""
        with_trace = [device for device, trace in enumerate(self.traces) if any(map(_tells_of_memory, trace))]
        return sorted({*with_trace, *(segment["device"] for segment in self.segments)})


def _tells_of_memory(entry: Any) -> bool:
    return not isinstance(entry, dict) or entry.get("action") not in SAYING_NOTHING


def read_layout(data: Any) -> Snapshot:
    """Return the snapshot in a file's plain data.

    Raises:
        TraceFileError: the data is not a snapshot, or is damaged; the message does not name the file.
    """
    if isinstance(data, list):  # torch.cuda._memory_viz accepts it too
        data = {"segments": data}
    if not isinstance(data, dict) or not isinstance(data.get("segments"), list):
        raise TraceFileError(
            "the file holds plain data, but not a PyTorch memory snapshot: expected a dict with a list of segments, "
            "as torch.cuda.memory._dump_snapshot writes"
        )
    traces = data.get("device_traces", [])
    if not isinstance(traces, list) or not all(isinstance(trace, list) for trace in traces):
        damaged("device_traces is not a list of lists")
    segments = [_segment(place, segment) for place, segment in enumerate(data["segments"])]
    _require_separate(segments)
    return Snapshot(segments, traces, _settings(data), _annotations(data, traces))


def bytes_of(about: Entry, key: str, where: str | int) -> int:
    """Return the size or address under `key`; `where` names its location, or is the number of its entry.

    Raises:
        TraceFileError: the value is missing, or impossible on a device.
    """
    value = about.get(key)
    if type(value) is not int or not 0 <= value < _MOST_BYTES:
        where = f"entry {where} of device_traces" if isinstance(where, int) else where
        damaged(f"{key} of {where} is not a number of bytes" if key in about else f"{where} has no {key}")
    return value


def whole(about: Entry, key: str, where: str, default: int | None = None) -> int:
    """Return the whole number under `key`, such as a time; `where` names its location.

    Raises:
        TraceFileError: the value is not a whole number of up to 62 bits.
    """
    value = about.get(key, default)
    if type(value) is not int or abs(value) >= _MOST_BYTES:
        damaged(f"{key} of {where} is {excerpt(value)}: expected a whole number")
    return value


def _require_separate(segments: Sequence[Mapping[str, Any]]) -> None:
    """Check that no two segments of a device share memory."""
    order = sorted(range(len(segments)), key=lambda place: (segments[place]["device"], segments[place]["address"]))
    for first, second in itertools.pairwise(order):
        one, other = segments[first], segments[second]
        if one["device"] != other["device"]:
            continue
        if one["address"] == other["address"]:
            damaged(f"segments {first} and {second} are both at address {one['address']:#x} of GPU {one['device']}")
        if one["address"] + one["total_size"] > other["address"]:
            damaged(f"segments {first} and {second} of GPU {one['device']} overlap at address {other['address']:#x}")


def _segment(place: int, about: Any) -> dict[str, Any]:
    where = f"segment {place}"
    if not isinstance(about, dict) or not isinstance(about.get("blocks"), list):
        damaged(f"{where} has no list of blocks")
    device = about.get("device", 0)
    if type(device) is not int or not 0 <= device < 1024:
        damaged(f"{where} has no valid device")
    start = address = bytes_of(about, "address", where)
    blocks = []
    for number, block in enumerate(about["blocks"]):
        blocks.append(_block(f"block {number} of {where}", block, address))
        address += blocks[-1]["size"]
    size = bytes_of(about, "total_size", where)
    if address - start != size:
        damaged(f"{where} has {size} bytes, but its blocks have {address - start}")
    expandable = bool(about.get("is_expandable"))
    return {
        "device": device,
        "address": start,
        "total_size": size,
        "is_expandable": expandable,
        "blocks": blocks,
    }


def _block(where: str, about: Any, address: int) -> dict[str, Any]:
    if not isinstance(about, dict):
        damaged(f"{where} is not a dict")
    size, state = bytes_of(about, "size", where), about.get("state")
    if state == "active_awaiting_free":  # as documented; PyTorch writes active_pending_free
        state = "active_pending_free"
    if state not in ("active_allocated", "active_pending_free", "inactive"):
        damaged(f"{where} is in an unknown state")
    frames, requested = about.get("frames", []), about.get("requested_size", size)
    history = about.get("history")
    if "frames" not in about and isinstance(history, list) and history and isinstance(history[0], dict):
        frames, requested = history[0].get("frames", []), history[0].get("real_size", requested)
    if state == "inactive":
        requested = 0  # the value in the file is from the block's last use
    if type(requested) is not int or not 0 <= requested <= size:
        damaged(f"requested_size of {where} is not from 0 to {size} bytes")
    if not isinstance(frames, list):
        damaged(f"the stack of {where} is not a list")
    return {"address": address, "size": size, "requested_size": requested, "state": state, "frames": frames}


def _settings(data: Entry) -> dict[str, Any]:
    settings = data.get("allocator_settings", {})
    if not isinstance(settings, dict) or not isinstance(settings.get("PYTORCH_CUDA_ALLOC_CONF", ""), str):
        damaged("allocator_settings does not hold the allocator's settings")
    return settings


def _annotations(data: Entry, traces: list[list[Any]]) -> dict[int, list[Annotation]]:
    found: dict[int, list[Annotation]] = {}
    if "external_annotations" in data:
        if not isinstance(data["external_annotations"], list):
            damaged("external_annotations is not a list")
        for place, about in enumerate(data["external_annotations"]):
            if isinstance(about, dict):
                _annotate(found, about.get("device"), about, ("name", "stage"), f"annotation {place}")
        return found
    for device, trace in enumerate(traces):
        for place, entry in enumerate(trace):
            if isinstance(entry, dict) and entry.get("action") == "user_defined":
                match entry.get("frames"):
                    case [dict(frame), *_]:
                        about = {**frame, "time_us": entry.get("time_us")}
                        _annotate(found, device, about, ("filename", "name"), f"entry {place} of device_traces")
    return found


def _annotate(found: dict[int, list[Annotation]], device: Any, about: Entry, keys: tuple[str, str], where: str) -> None:
    """Add an annotation whose name and stage are under `keys`; those of other kinds, or without time, are not used."""
    if about.get("time_us") is None:
        return
    match device, *(about.get(key) for key in keys):
        case int(device), str(name), ("START" | "END") as stage:
            annotation = Annotation(name, stage == "START", whole(about, "time_us", where))
            found.setdefault(device, []).append(annotation)


def damaged(what: str) -> NoReturn:
    """Refuse a snapshot that contradicts its own layout.

    Raises:
        TraceFileError: always.
    """
    raise TraceFileError(f"a damaged memory snapshot: {what}")
