"""Join the allocator's blocks with the tracker's storages into one Trace, so that every byte has an owner."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memscope.allocator.recorded import Entry, RecordedBlocks, Refusal, read_blocks
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.alive import occasion
from memscope.analysis.ran_out import alive_before
from memscope.hooks.allocations import Allocations
from memscope.hooks.moments import Moments
from memscope.trace import CATEGORIES, MARK_COLUMNS, PHASES, Ints, Trace, columns_of
from memscope.trace.notes import add_note

__all__ = ["Recording", "joined"]

_WORKSPACE, _OTHER = CATEGORIES.index("workspace"), CATEGORIES.index("other")


@dataclass(frozen=True)
class Recording:
    """The recorded history of one device's allocator, from `torch.cuda.memory._snapshot()`."""

    before: Sequence[Entry]
    """The device's segments when recording began."""
    entries: Sequence[Entry]
    """All entries of the history since then, none of them dropped."""
    after: Sequence[Entry]
    """The device's segments when recording ended."""
    settings: AllocatorSettings
    capacity_bytes: int
    """`torch.cuda.get_device_properties().total_memory`."""
    limit_bytes: int | None = None
    """The process's own memory limit, if one is set: `torch.cuda.set_per_process_memory_fraction`."""


def joined(
    history: Recording,
    moments: Moments,
    seen: Allocations,
    *,
    modules: Sequence[str],
    ops: Sequence[str],
    meta: Mapping[str, Any],
    ran_out: bool | None = False,
) -> Trace:
    """Build a trace with a row for every block of the history.

    A block belongs to the storage first seen at its address, in the operator that allocated the block. A block without
    a storage is a `workspace` of the operator that allocated it. A block that no operator allocated, or that is older
    than the recording and has no known owner, is `other`. A block dies when its memory is returned to the allocator
    (`free_requested`), as counted by `torch.cuda.memory_allocated`, even if another stream still uses it.

    Args:
        history: the allocator's history.
        moments: the host's activity; its sightings belong to the births in `seen`, in the same order.
        seen: the storages that the tracker saw, each with its category.
        modules: names of the modules, indexed by `seen`.
        ops: names of the operators, indexed by `seen` and `moments`.
        meta: further entries for the trace's `meta`.
        ran_out: whether running out of memory ended the recording; None: it did if the last failed request is of the
            last step. `meta["out_of_memory"]` then describes that request, as in a simulation; the trace ends there.
            Requests that failed in a run that went on are a note.

    Raises:
        MemscopeError: the history contradicts itself.
    """
    taken_in = [address for moment, address in moments.sightings if moment == 0]
    blocks = read_blocks(history.before, history.entries, history.settings, taken_in)
    within, begun = moments.of_entries(history.entries)
    owners, strange_bytes = _owners(blocks, within, begun, moments, seen)
    rows = [
        _of_storage(seen, owner) if owner >= 0 else _of_block(moments, within, begun, entry)
        for owner, entry in zip(owners, blocks.entry.tolist(), strict=True)
    ]
    about: dict[str, Any] = {
        **meta,
        "capacity": history.capacity_bytes,
        "peak_reserved": blocks.peak_reserved,
        "peak_active": blocks.peak_active,
        "reserved_at_end": sum(segment["total_size"] for segment in history.after),
        "size_differences": blocks.size_differences(history.after),
        "outside_allocator": strange_bytes,
        "out_of_memory": None,
    }
    trace = Trace(
        size=blocks.size,
        requested=blocks.requested,
        **columns_of(("category", "module", "op", "phase", "step", "micro_batch"), rows),
        born=blocks.born,
        freed=blocks.freed,
        **columns_of(MARK_COLUMNS, _marks(moments, blocks, begun)),
        modules=tuple(modules),
        ops=tuple(ops),
        meta=about,
        reserved=blocks.reserved,
    )
    if not blocks.refusals:
        return trace
    refusal = blocks.refusals[-1]
    place = _of_block(moments, within, begun, refusal.entry)
    if ran_out or (ran_out is None and place[4] == trace.mark_step[-1]):
        about["out_of_memory"] = _described(trace, refusal, place, history.limit_bytes)
    else:
        when = occasion(place[4], PHASES[place[3]])
        add_note(about, f"The GPU ran out of memory, last in {when}, and the program went on")
    return trace


def _owners(
    blocks: RecordedBlocks, within: Ints, begun: Ints, moments: Moments, seen: Allocations
) -> tuple[list[int], int]:
    """The storage of each block (-1: none), and the bytes of storages that are in no block of the allocator."""
    last: dict[tuple[int, int], int] = {}  # the last block an operator allocated at an address holds its output
    by_address: dict[int, tuple[list[int], list[int]]] = {}
    for row, (address, entry) in enumerate(zip(blocks.address.tolist(), blocks.entry.tolist(), strict=True)):
        if entry >= 0:
            last[int(within[entry]), address] = row
        since, rows = by_address.setdefault(address, ([], []))
        since.append(int(begun[entry]) if entry >= 0 else -1)
        rows.append(row)
    owners, strange_bytes = [-1] * len(blocks.size), 0
    for storage, (moment, address) in enumerate(moments.sightings):
        row = last.get((moment, address), -1)
        if row < 0 and address in by_address:  # seen in another operator than the one that allocated it
            since, rows = by_address[address]
            at = bisect_right(since, moment) - 1
            row = rows[at] if at >= 0 else -1
        if row < 0:
            strange_bytes += seen.births[storage].size_bytes
        elif owners[row] < 0:
            owners[row] = storage
    return owners, strange_bytes


def _of_storage(seen: Allocations, storage: int) -> tuple[int, int, int, int, int, int]:
    """Category, module, op, phase, step and micro-batch of a storage."""
    birth = seen.births[storage]
    return seen.category[storage], birth.module, birth.op, birth.phase, birth.step, birth.micro_batch


def _of_block(moments: Moments, within: Ints, begun: Ints, entry: int) -> tuple[int, int, int, int, int, int]:
    """The same for a block without a storage; `entry` is -1 for a block older than the recording."""
    number = int(within[entry]) if entry >= 0 else -1
    if number >= 0:
        return _WORKSPACE, *_whereabouts(moments, number)
    module, _, phase, step, micro_batch = _whereabouts(moments, int(begun[entry]) if entry >= 0 else 0)
    return _OTHER, module, 0, phase, step, micro_batch


def _whereabouts(moments: Moments, number: int) -> tuple[int, int, int, int, int]:
    row = moments.rows[number]
    return row.module, row.op, row.phase, row.step, row.micro_batch


def _marks(moments: Moments, blocks: RecordedBlocks, begun: Ints) -> list[tuple[int, ...]]:
    """Event, phase, step and micro-batch of each change of phase."""
    of_event = np.where(blocks.event_entry >= 0, np.append(begun, 0)[blocks.event_entry], -1)
    events = np.searchsorted(of_event, moments.marks, side="left").tolist()
    events[0] = 0  # blocks older than the recording belong to the setup
    marks: list[tuple[int, ...]] = []
    for number, event in zip(moments.marks, events, strict=True):
        row = moments.rows[number]
        if marks and marks[-1][0] == event:
            marks.pop()
        if not marks or marks[-1][1:] != (row.phase, row.step, row.micro_batch):
            marks.append((event, row.phase, row.step, row.micro_batch))
    return marks


def _described(
    trace: Trace, refusal: Refusal, place: tuple[int, int, int, int, int, int], limit_bytes: int | None
) -> dict[str, Any]:
    """The failed request and the memory in use, as JSON values."""
    _, module, op, phase, step, micro_batch = place
    return {
        "event": refusal.event,
        "step": step,
        "micro_batch": micro_batch,
        "phase": PHASES[phase],
        "module": trace.modules[module],
        "op": trace.ops[op],
        "category": None,
        **refusal.sizes(limit_bytes),
        "by_category": alive_before(trace, refusal.event),
    }
