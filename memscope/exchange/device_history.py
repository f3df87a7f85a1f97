"""The complete history of one device's allocator, from a snapshot's final state and its list of actions.

The list may begin in the middle of a run (recording began late, or its oldest entries were dropped), and may lack
actions (`skip_actions`, PyTorch 2.11). The state at its beginning is derived backwards from the final state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memscope.allocator.recorded import BLOCK_COLUMNS, Entry, Memory, RecordedBlocks, read_blocks
from memscope.allocator.settings import SMALL_SIZE, AllocatorSettings
from memscope.errors import MemscopeError, UsageError
from memscope.exchange.layout import SAYING_NOTHING, Annotation, Frames, Snapshot, bytes_of, damaged, whole
from memscope.trace import Progress, columns_of, no_progress
from memscope.units import format_bytes

__all__ = ["DeviceHistory", "read_device", "segments_before"]

_CHANGES = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
"""Action → 1 if it takes memory from the driver, -1 if it returns memory to it."""
_FREES = ("free_requested", "free_completed")
_OF_BLOCKS = frozenset({"alloc", *_FREES})
_KNOWN = frozenset({*_OF_BLOCKS, *_CHANGES, "oom", "annotate"})
_FREE, _ALLOCATED, _PENDING = range(3)
_STATES = ("inactive", "active_allocated", "active_pending_free")
_TELL_EVERY = 100_000


@dataclass(frozen=True)
class DeviceHistory:
    """The blocks of one device, and the actions of its allocator with their stacks."""

    device: int
    blocks: RecordedBlocks
    entries: Sequence[Entry]
    """The allocator's actions, with missing frees inserted; `blocks` holds indices into it."""
    frames_at_end: dict[int, Frames]
    """Address → stack that allocated the block, for blocks alive at the end."""
    annotations: Sequence[Annotation]
    reserved_at_end: int
    size_differences: int
    """Bytes by which the blocks alive at the end differ from those in the snapshot; 0: all agree."""
    notes: tuple[str, ...]
    """Inexact values and the reasons, as sentences."""


@dataclass
class _Lifetimes:
    """The entries of a history with missing frees inserted, and their evidence of the state before the history."""

    entries: list[Entry] = field(default_factory=list)
    state: dict[int, int] = field(default_factory=dict)
    """Address → its state at the end, for every address in the entries."""
    freed_first: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Address whose first entry is a free → its state before, and requested bytes."""
    missing_frees: int = 0
    missing_allocations: int = 0
    unknown: int = 0

    def notes(self) -> list[str]:
        """Describe missing and unknown entries, as sentences."""
        found = []
        if self.missing_frees:
            found.append(
                f"frees missing from the history: {self.missing_frees:,}; each is assumed to have happened right "
                "before its memory was allocated again"
            )
        if self.missing_allocations:
            found.append(f"frees of memory that was not allocated: {self.missing_allocations:,} (ignored)")
        if self.unknown:
            found.append(f"entries of kinds unknown to this version of memscope: {self.unknown:,} (ignored)")
        return found


def read_device(snapshot: Snapshot, device: int, progress: Progress) -> DeviceHistory:
    """Reconstruct the history of a device's allocator from a snapshot.

    Raises:
        TraceFileError: an entry is damaged; the message does not name the file.
    """
    after, lived = _followed(snapshot, device, progress)
    settings, notes = _settings(snapshot.settings)
    blocks, more = _blocks(after, lived, settings)
    return DeviceHistory(
        device=device,
        blocks=blocks,
        entries=lived.entries,
        frames_at_end={block["address"]: block["frames"] for block in _all_blocks(after) if block["frames"]},
        annotations=snapshot.annotations.get(device, ()),
        reserved_at_end=sum(segment["total_size"] for segment in after),
        size_differences=blocks.size_differences(after),
        notes=(*notes, *lived.notes(), *more),
    )


def segments_before(snapshot: Snapshot, device: int) -> list[dict[str, Any]]:
    """Return a device's segments at the beginning of its history: `address, total_size, is_expandable, blocks`.

    The blocks of each segment leave no gaps.

    Raises:
        MemscopeError: the history contradicts the final state.
        TraceFileError: an entry is damaged; the message does not name the file.
    """
    after, lived = _followed(snapshot, device)
    settings, _ = _settings(snapshot.settings)
    return _segments_before(after, lived.entries, *_blocks_before(after, lived, settings), settings)


def _followed(
    snapshot: Snapshot, device: int, progress: Progress = no_progress
) -> tuple[list[dict[str, Any]], _Lifetimes]:
    """A device's segments at the end, and its history."""
    trace = snapshot.traces[device] if device < len(snapshot.traces) else []
    return [segment for segment in snapshot.segments if segment["device"] == device], _lifetimes(trace, progress)


def _settings(told: Mapping[str, Any]) -> tuple[AllocatorSettings, list[str]]:
    """The allocator's settings, and notes on settings that could not be parsed.

    The snapshot's parsed values take precedence, because they do not depend on how the settings were made. Source:
    `allocator_settings` in torch/csrc/cuda/Module.cpp, PyTorch 2.3 and later; -1 is "no limit", divisions are in order.
    """
    try:
        if "roundup_power2_divisions" not in told:
            return AllocatorSettings.parse(told.get("PYTORCH_CUDA_ALLOC_CONF", "")), []
        match told:
            case {
                "max_split_size": int(limit_bytes),
                "roundup_power2_divisions": dict(divisions),
                "expandable_segments": bool(expandable),
            } if all(type(count) is int for count in divisions.values()):
                return AllocatorSettings(
                    expandable_segments=expandable,
                    max_split_size_bytes=limit_bytes if limit_bytes >= 0 else None,
                    roundup_power2_divisions=tuple(divisions.values()),
                ), []
    except UsageError as error:
        return AllocatorSettings(), [f"{error}; memscope assumes the default settings"]
    damaged("allocator_settings does not hold the allocator's settings")


def _lifetimes(trace: Sequence[Any], progress: Progress) -> _Lifetimes:
    """Check every entry, insert missing frees, and note addresses that were in use before the history."""
    lived = _Lifetimes()
    for place, entry in enumerate(trace):
        if place % _TELL_EVERY == 0:
            progress("following", place, len(trace))
        action = entry.get("action") if isinstance(entry, dict) else None
        if not isinstance(action, str):
            damaged(f"entry {place} of device_traces has no action")
        if action not in _KNOWN:
            lived.unknown += action not in SAYING_NOTHING
            continue
        bytes_of(entry, "size", place)
        bytes_of(entry, "device_free" if action == "oom" else "addr", place)
        whole(entry, "time_us", f"entry {place} of device_traces", 0)
        if action in _OF_BLOCKS:
            _follow(lived, action, entry)
        else:
            lived.entries.append(entry)
    return lived


def _follow(lived: _Lifetimes, action: str, entry: Entry) -> None:
    address = entry["addr"]
    state = lived.state.get(address)
    if action == "alloc":
        if state:
            lived.missing_frees += state == _ALLOCATED
            lived.entries.extend({**entry, "action": free, "frames": []} for free in _FREES[state - 1 :])
        lived.state[address] = _ALLOCATED
    else:
        if state is None:
            state = _ALLOCATED if action == "free_requested" else _PENDING
            lived.freed_first[address] = state, entry["size"]
        requested = action == "free_requested"
        if state == _FREE or (requested and state == _PENDING):
            lived.missing_allocations += 1
            return
        if not requested and state == _ALLOCATED:
            lived.entries.append({**entry, "action": "free_requested"})
        lived.state[address] = _PENDING if requested else _FREE
    lived.entries.append(entry)


def _blocks(
    after: list[dict[str, Any]], lived: _Lifetimes, settings: AllocatorSettings
) -> tuple[RecordedBlocks, list[str]]:
    """The blocks, and notes on inexact sizes."""
    before, guessed = _blocks_before(after, lived, settings)
    notes = []
    if guessed:
        size = sum(before[address]["size"] for address in guessed)
        notes.append(
            f"blocks allocated before the history began and freed in it: {len(guessed):,} ({format_bytes(size)}); "
            "their sizes are the requested bytes, rounded up, and may be up to 1 MiB too small where no block was "
            "allocated behind them"
        )
    try:
        segments = _segments_before(after, lived.entries, before, guessed, settings)
        return read_blocks(segments, lived.entries, settings), notes
    except MemscopeError:
        notes.append(
            "the history does not match the segments (the recording may have skipped actions); the size of every block "
            "is the requested bytes, rounded up, and may be up to 1 MiB too small"
        )
        return _rounded_blocks(after, lived.entries, before, settings), notes


def _blocks_before(
    after: list[dict[str, Any]], lived: _Lifetimes, settings: AllocatorSettings
) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """By address, the blocks in use when the history began; and the addresses of blocks with estimated sizes."""
    before = {}
    for block in _all_blocks(after):
        address = block["address"]
        state = lived.state.get(address)
        waits = state == _PENDING and block["state"] == "active_pending_free" and address in lived.freed_first
        if block["state"] != "inactive" and (state is None or waits):
            before[address] = {**block, "state": _STATES[lived.freed_first[address][0]]} if waits else block
    guessed = [address for address in lived.freed_first if address not in before]
    for address in guessed:
        state, requested = lived.freed_first[address]
        before[address] = {
            "address": address,
            "size": settings.block_size(requested),
            "requested_size": requested,
            "state": _STATES[state],
        }
    return dict(sorted(before.items())), guessed


def _segments_before(
    after: list[dict[str, Any]],
    entries: Sequence[Entry],
    before: dict[int, dict[str, Any]],
    guessed: Sequence[int],
    settings: AllocatorSettings,
) -> list[dict[str, Any]]:
    """The segments at the beginning of the history, with their blocks: the final segments, with all actions undone.

    Raises:
        MemscopeError: the history contradicts the final state.
    """
    memory = Memory()
    for segment in after:
        memory.hold(segment["address"], segment["total_size"], grows=segment["is_expandable"])
    for entry in reversed(entries):
        action = entry["action"]
        if action in ("segment_alloc", "segment_map"):
            memory.give_back(entry["addr"], entry["size"])
        elif action in ("segment_free", "segment_unmap"):
            memory.hold(entry["addr"], entry["size"], grows=action == "segment_unmap")
    ranges = memory.ranges()
    if not settings.expandable_segments:  # expandable segments split off every rest
        before = before | _with_slack(before, guessed, [end for _, end, _ in ranges], entries, settings)
    segments, waiting = [], list(reversed(before.values()))
    for start, end, grows in ranges:
        blocks, address = [], start
        while waiting and waiting[-1]["address"] < end:
            block = waiting.pop()
            if block["address"] < address:
                raise MemscopeError("blocks overlap, or lie outside all segments")
            blocks += [{"size": block["address"] - address, "state": "inactive"}, block]
            address = block["address"] + block["size"]
        if address > end:
            raise MemscopeError("a block is larger than its segment")
        blocks.append({"size": end - address, "state": "inactive"})
        segments.append({"address": start, "total_size": end - start, "is_expandable": grows, "blocks": blocks})
    if waiting:
        raise MemscopeError("blocks lie outside all segments")
    return segments


def _with_slack(
    before: dict[int, dict[str, Any]],
    guessed: Sequence[int],
    ends: Sequence[int],
    entries: Sequence[Entry],
    settings: AllocatorSettings,
) -> dict[int, dict[str, Any]]:
    """The blocks of estimated size, extended by the space behind them that is too small to be a block.

    PyTorch does not split a rest of up to 1 MiB off a large block, and splits nothing off blocks of `max_split_size_mb`
    or more (`should_split`): such a rest, up to the next block or the end of the segment, belongs to the block. The
    next block may be one that was allocated later.
    """
    alive = sorted(address for address in guessed if before[address]["size"] > SMALL_SIZE)
    sizes: dict[int, int] = {}

    def begins(address: int) -> None:
        at = bisect_left(alive, address) - 1
        if at >= 0 and alive[at] not in sizes:
            size, least = address - alive[at], before[alive[at]]["size"]
            whole = settings.max_split_size_bytes is not None and least >= settings.max_split_size_bytes
            if 0 <= size - least <= SMALL_SIZE or (whole and size > least):
                sizes[alive[at]] = size

    for address in sorted((*before, *ends)):
        begins(address)
    for entry in entries:
        if entry["action"] == "alloc":
            begins(entry["addr"])
        elif entry["action"] == "free_completed":
            at = bisect_left(alive, entry["addr"])
            if alive[at : at + 1] == [entry["addr"]]:
                del alive[at]
    return {address: {**before[address], "size": size} for address, size in sizes.items()}


def _rounded_blocks(
    after: list[dict[str, Any]],
    entries: Sequence[Entry],
    before: dict[int, dict[str, Any]],
    settings: AllocatorSettings,
) -> RecordedBlocks:
    """The blocks of a history that contradicts its segments."""
    changes = [_CHANGES.get(entry["action"], 0) * entry["size"] for entry in entries]
    held = np.cumsum([0, *changes], dtype=np.int64)
    held += sum(segment["total_size"] for segment in after) - held[-1]
    rows = [
        (address, block["size"], block["requested_size"], born, -1)
        for born, (address, block) in enumerate(before.items())
        if block["state"] == _STATES[_ALLOCATED]
    ]
    events, freed = [-1] * len(rows), [-1] * len(rows)
    alive = {row[0]: place for place, row in enumerate(rows)}
    for place, entry in enumerate(entries):
        if entry["action"] == "alloc":
            alive[entry["addr"]] = len(rows)
            rows.append((entry["addr"], settings.block_size(entry["size"]), entry["size"], len(events), place))
            freed.append(-1)
            events.append(place)
        elif entry["action"] == "free_requested":
            freed[alive.pop(entry["addr"])] = len(events)
            events.append(place)
    event_entry = np.array(events, dtype=np.int64)
    return RecordedBlocks(
        **columns_of(BLOCK_COLUMNS, rows),
        freed=np.array(freed, dtype=np.int64),
        event_entry=event_entry,
        reserved=np.maximum(held[event_entry + 1], 0),
        peak_reserved=int(held.max(initial=0)),
        peak_active=0,
        refusals=(),
    )


def _all_blocks(segments: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for segment in segments:
        yield from segment["blocks"]
