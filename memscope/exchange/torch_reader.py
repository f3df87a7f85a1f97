"""PyTorch's memory snapshots as traces: `memscope import`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memscope.allocator.recorded import Entry
from memscope.analysis.ran_out import alive_before
from memscope.errors import TraceFileError, UsageError
from memscope.exchange import own_snapshot
from memscope.exchange.annotations import annotated
from memscope.exchange.device_history import DeviceHistory, read_device
from memscope.exchange.inference import Course, categories_of, course_of
from memscope.exchange.layout import Snapshot, damaged, read_layout
from memscope.exchange.plain_pickle import read_plain_pickle
from memscope.exchange.stacks import NO_STACK, Place, StackReader
from memscope.exchange.told import Told, told_by
from memscope.trace import PHASES, Ints, Progress, Trace, no_progress
from memscope.units import format_bytes

__all__ = ["INFERRED", "import_snapshot"]

INFERRED = ("category", "module", "op", "phase", "step", "micro_batch")
"""Columns that a snapshot does not hold and memscope infers; `meta["inferred"]` of a trace names them."""
_NO_REGION = ("", "N/A")
"""`compile_context` outside compiled code (c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.11)."""
_TELL_EVERY = 100_000


def import_snapshot(
    path: str | os.PathLike[str], *, device: int | None = None, progress: Progress = no_progress
) -> Trace:
    """Convert a snapshot by `torch.cuda.memory._dump_snapshot` to a trace, without executing anything in the file.

    A snapshot that memscope wrote yields the trace from which it was written. In any other snapshot, sizes, order and
    lifetimes are the allocator's own. Category, phase, step, micro-batch, module and operator are what labels of
    memscope's recorder tell, and inferred where there are none (`meta["inferred"]`). `meta["imported"]["notes"]` lists
    values that are not exact because history is missing.

    Args:
        path: a pickle of protocol 2 to 5, in any layout since PyTorch 1.10.
        device: index of the GPU; None: the only one in the file.
        progress: called with the current activity and its progress.

    Raises:
        TraceFileError: the file is missing, not a snapshot, or damaged, or holds more than plain data.
        UsageError: the device is not in the file, or the file holds several and none is chosen.
    """
    path = Path(path)
    data = read_plain_pickle(path, progress)
    try:
        if own_snapshot.is_own(data):
            return own_snapshot.decode(data)
        snapshot = read_layout(data)
        del data
        return _inferred(read_device(snapshot, _device(path, snapshot, device), progress), path, progress)
    except TraceFileError as error:
        raise TraceFileError(f"{path}: {error}") from None


def _device(path: Path, snapshot: Snapshot, device: int | None) -> int:
    there = snapshot.devices
    if not there:
        damaged("it has neither segments nor a history")
    if device is None and len(there) == 1:
        return there[0]
    if device is None or device not in there:
        has = "holds several GPUs" if device is None else f"does not hold GPU {device}"
        raise UsageError(f"{path} {has}: choose one of {', '.join(map(str, there))} with --device")
    return device


def _inferred(history: DeviceHistory, path: Path, progress: Progress) -> Trace:
    blocks, entries = history.blocks, history.entries
    stacks = StackReader()
    stack = _stacks(history, stacks, progress)
    of_block = stack[blocks.born]
    told = told_by(history)
    course = told.course if told else _course(history, stacks.places, stack)
    modules, module = _table(*_labelled(*_modules(history, stacks.places, of_block), told.module if told else ()))
    ops, op = _table(*_labelled([place.op for place in stacks.places], of_block, told.op if told else ()))
    meta = _meta(history, path, told, has_stacks=bool(of_block.any()))
    refusal = blocks.refusals[-1] if blocks.refusals else None
    if refusal and (blocks.entry > refusal.entry).any():
        refusal = None  # the run continued after this refusal
    category = categories_of(course, blocks.born, blocks.freed, stacks.places, of_block, cut_short=refusal is not None)
    if told:
        category = np.where(told.category >= 0, told.category, category)
    trace = Trace(
        size=blocks.size,
        requested=blocks.requested,
        category=category,
        module=module,
        op=op,
        phase=course.phase[blocks.born],
        step=course.step[blocks.born],
        micro_batch=course.micro_batch[blocks.born],
        born=blocks.born,
        freed=blocks.freed,
        **course.marks(),
        modules=modules,
        ops=ops,
        meta=meta,
        reserved=blocks.reserved,
    )
    if refusal:
        place = stacks.places[stacks.read(_frames(entries[refusal.entry]))]
        meta["out_of_memory"] = {**_when_it_ran_out(trace, refusal.event, place), **refusal.sizes()}
    return trace


def _stacks(history: DeviceHistory, stacks: StackReader, progress: Progress) -> Ints:
    """Index in `stacks.places` of each event's stack: int64 `[events]`."""
    blocks, entries = history.blocks, history.entries
    found = np.zeros(len(blocks.event_entry), dtype=np.int64)
    for event, entry in enumerate(blocks.event_entry.tolist()):
        if event % _TELL_EVERY == 0:
            progress("reading stacks", event, len(found))
        if entry >= 0:
            found[event] = stacks.read(_frames(entries[entry]))
    alive = np.flatnonzero(blocks.freed < 0)  # with context="state", only live blocks have stacks
    for born, address in zip(blocks.born[alive].tolist(), blocks.address[alive].tolist(), strict=True):
        if found[born] == 0:
            found[born] = stacks.read(history.frames_at_end.get(address, ()))
    return found


def _frames(entry: Entry) -> list[Mapping[str, Any]]:
    frames = entry.get("frames", [])
    if not isinstance(frames, list):
        damaged("the stack of an entry of device_traces is not a list")
    return frames


def _course(history: DeviceHistory, places: Sequence[Place], stack: Ints) -> Course:
    event_entry = history.blocks.event_entry
    phases = np.array([-1 if place.phase is None else PHASES.index(place.phase) for place in places])
    told, ended = phases[stack], np.zeros(len(stack), dtype=bool)
    if history.annotations:
        times = [history.entries[entry].get("time_us", 0) if entry >= 0 else 0 for entry in event_entry.tolist()]
        clock = np.array(times, dtype=np.int64)
        annotation, ended = annotated(history.annotations, clock)
        told = np.where(told < 0, annotation, told)
    is_born = np.zeros(len(stack), dtype=bool)
    is_born[history.blocks.born] = True
    without_stack = (stack == 0) & bool(stack.any())
    return course_of(told, is_born, without_stack, int(np.count_nonzero(event_entry < 0)), ended)


def _modules(history: DeviceHistory, places: Sequence[Place], of_block: Ints) -> tuple[list[str], Ints]:
    """The module of each block; if its stack shows none, the compiled region that allocated it, if any."""
    names, index = [place.module for place in places], of_block.copy()
    regions: dict[str, int] = {}
    for row, entry in enumerate(history.blocks.entry.tolist()):
        region = history.entries[entry].get("compile_context") if entry >= 0 else None
        if isinstance(region, str) and region not in _NO_REGION and names[index[row]] == NO_STACK.module:
            index[row] = regions.setdefault(region, len(names) + len(regions))
    return [*names, *regions], index


def _labelled(names: Sequence[str], index: Ints, told: Sequence[str | None]) -> tuple[list[str], Ints]:
    """Names and their index `[blocks]`, with the names that labels tell in place of the inferred ones."""
    known = [*names]
    places: dict[str, int] = {}
    index = index.copy()
    for row, name in enumerate(told):
        if name is not None:
            index[row] = place = places.setdefault(name, len(known))
            known += [name] if place == len(known) else []
    return known, index


def _table(names: Sequence[str], index: Ints) -> tuple[tuple[str, ...], Ints]:
    """The distinct names in use, and the index converted to them."""
    codes: dict[str, int] = {}
    new = np.zeros(len(names), dtype=np.int64)
    for place in np.unique(index).tolist():
        new[place] = codes.setdefault(names[place], len(codes))
    return tuple(codes), new[index]


def _meta(history: DeviceHistory, path: Path, told: Told | None, *, has_stacks: bool) -> dict[str, Any]:
    notes, differences = list(history.notes), history.size_differences
    if differences:
        notes.append(f"blocks alive at the end differ from the snapshot's by {format_bytes(differences)}")
    if not has_stacks and not told:
        notes.append("the snapshot has no stacks (recorded without context), so the purpose of memory is unknown")
    unknown = {
        "process_bytes": None,
        "used_bytes": None,
        "others_bytes": None,
        "reason": "a snapshot does not contain it",
    }
    return {
        "target": path.stem,
        "strategies": [],
        "device": {"name": f"GPU {history.device}", "simulated": False},
        "driver": {"before": unknown, "after": unknown},
        "peak_reserved": history.blocks.peak_reserved,
        "reserved_at_end": history.reserved_at_end,
        "size_differences": differences,
        "out_of_memory": None,
        "imported": {"file": path.name, "notes": notes},
        "inferred": told.lacks() if told else list(INFERRED),
    }


def _when_it_ran_out(trace: Trace, event: int, place: Place) -> dict[str, Any]:
    """The place of a failed request and the memory alive at that moment, as JSON values."""
    mark = trace.mark_at(event)
    return {
        "event": event,
        "step": int(trace.mark_step[mark]),
        "micro_batch": int(trace.mark_micro_batch[mark]),
        "phase": place.phase or PHASES[int(trace.mark_phase[mark])],
        "module": place.module,
        "op": place.op,
        "category": None,
        "by_category": alive_before(trace, event),
    }
