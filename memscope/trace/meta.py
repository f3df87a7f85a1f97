"""The header of a trace file and the metadata of a trace (`Trace.meta`): their schema, and what it cannot say.

Every field of `meta` is optional: recorders, simulations and imports write those that they know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict

import numpy as np

from memscope.trace.columns import CATEGORIES, PHASES, Category, Phase
from memscope.trace.schema import Count, Seconds, SizeBytes, mismatch

__all__ = ["damage_of_meta", "damage_of_texts"]

_DEEPEST = 64
"""Bound on the nesting of settings."""


class _Device(TypedDict):
    name: str
    simulated: bool


class _Parameters(TypedDict):
    total: Count
    trainable: Count


class _OutOfMemory(TypedDict):
    event: Count
    step: int
    micro_batch: int
    phase: Phase
    module: str
    op: str
    category: Category | None
    requested: SizeBytes
    allocated: SizeBytes
    reserved: SizeBytes
    largest_free: SizeBytes
    limit: SizeBytes
    by_category: dict[Category, SizeBytes]


class _Counted(TypedDict):
    process_bytes: SizeBytes | None
    used_bytes: SizeBytes | None
    others_bytes: SizeBytes | None
    reason: str


class _Driver(TypedDict):
    before: _Counted
    after: _Counted


class _AllocatorSettings(TypedDict, total=False):
    expandable_segments: bool
    max_split_size_bytes: SizeBytes | None
    max_non_split_rounding_bytes: SizeBytes | None
    roundup_power2_divisions: list[Count]
    garbage_collection_threshold: float | None
    large_segment_size_bytes: SizeBytes
    per_process_memory_fraction: float
    throw_on_cudamalloc_oom: bool
    version: str


class _Allocator(TypedDict):
    settings: _AllocatorSettings
    cache_emptied: list[Count]


class _Cost(TypedDict):
    assumed: list[str]
    rows: list[tuple[int, int, int, int, int, Count, Count, Count, Seconds]]


class _Call(TypedDict):
    module: str
    step: int
    micro_batch: int
    began: Count
    ended: int
    given: list[Count]
    gave: list[Count]


class _Imported(TypedDict):
    file: str
    notes: list[str]


class _Command(TypedDict):
    target: str
    preset: str | None
    settings: dict[str, Any]


class _Program(TypedDict):
    command: list[str]
    exit_code: int


class _Assumption(TypedDict):
    what: str
    value: str
    where: str


class _Meta(TypedDict, total=False):
    target: str
    strategies: list[str]
    chosen: dict[str, dict[str, str]]
    settings: dict[str, Any]
    device: _Device
    versions: dict[str, str]
    notes: list[str]
    assumptions: list[_Assumption]
    command: _Command | None
    program: _Program
    samples_per_step: Count | None
    positions: Count
    parameters: _Parameters
    models: dict[str, str]
    flops: list[Count] | None
    seconds: list[Seconds] | None
    calls: list[_Call]
    cost: _Cost | None
    estimated_workspaces: list[str]
    capacity: SizeBytes | None
    context: SizeBytes
    allocator: _Allocator
    peak_reserved: SizeBytes
    peak_active: SizeBytes
    reserved_before: SizeBytes
    reserved_at_end: SizeBytes
    size_differences: SizeBytes
    outside_allocator: SizeBytes
    out_of_memory: _OutOfMemory | None
    driver: _Driver
    imported: _Imported
    inferred: list[str]


class _Texts(TypedDict):
    modules: list[str]
    ops: list[str]
    meta: _Meta


def damage_of_texts(texts: Mapping[str, Any]) -> str:
    """The first field of a trace file's header that differs from the schema; empty if none does."""
    return mismatch(texts, _Texts) or next(_too_deep(texts["meta"]), "")


def damage_of_meta(
    meta: Mapping[str, Any], *, steps: tuple[int, ...], events: int, modules: int, ops: int, has_allocator: bool
) -> str:
    """The first contradiction between the metadata and the columns of a trace; empty if there is none.

    Args:
        meta: metadata that agrees with the schema.
        steps: the optimizer steps in the trace.
        events: number of events.
        modules: number of names of modules.
        ops: number of names of operators.
        has_allocator: whether the trace has reserved bytes.
    """
    lacking = [f"meta has no {name}, which {why}" for name, why in _needed(meta, has_allocator) if name not in meta]
    if lacking:
        return lacking[0]
    flops = meta.get("flops")
    if flops and steps and len(flops) <= steps[-1]:
        return f"meta.flops has {len(flops)} entries: expected one for each step up to step {steps[-1]}"
    if meta.get("context", 0) > (meta.get("capacity") or 2**62):
        return f"meta.context is {meta['context']}: expected at most meta.capacity, {meta['capacity']}"
    out_of_memory = meta.get("out_of_memory")
    if out_of_memory and out_of_memory["event"] > events:
        return f"meta.out_of_memory.event is {out_of_memory['event']}: expected at most {events}, the number of events"
    if out_of_memory and set(out_of_memory["by_category"]) != set(CATEGORIES):
        return "meta.out_of_memory.by_category: expected every category"
    return _damage_of_cost(meta.get("cost"), modules, ops)


def _needed(meta: Mapping[str, Any], has_allocator: bool) -> Iterator[tuple[str, str]]:
    """The fields that others require, and why."""
    if has_allocator:
        reserved = "a trace with reserved bytes needs"
        yield "peak_reserved", reserved
        if "driver" in meta and all(meta["driver"][when]["used_bytes"] is not None for when in ("before", "after")):
            yield from ((name, "meta.driver needs") for name in ("reserved_before", "reserved_at_end"))
    if meta.get("out_of_memory"):
        yield "device", "meta.out_of_memory needs"
    if "allocator" in meta:
        yield from ((name, "meta.allocator needs") for name in ("capacity", "context", "out_of_memory"))


def _damage_of_cost(cost: Mapping[str, Any] | None, modules: int, ops: int) -> str:
    if not cost or not cost["rows"]:
        return ""
    for column, (name, size) in enumerate(
        {"a phase": len(PHASES), "a module": modules, "an operator": ops}.items(), start=2
    ):
        codes = np.array([row[column] for row in cost["rows"]], dtype=object)
        wrong = np.flatnonzero((codes < 0) | (codes >= size))
        if wrong.size:
            row = int(wrong[0])
            return f"meta.cost.rows[{row}][{column}] is {codes[row]}: expected the number of {name}, 0 to {size - 1}"
    return ""


def _too_deep(meta: Mapping[str, Any]) -> Iterator[str]:
    """The fields of any content that are nested so deep that showing them fails."""
    declared = _Meta.__annotations__
    for name, value in meta.items():
        if name not in ("settings", "command") and name in declared:
            continue
        layer = [value]
        for _ in range(_DEEPEST):
            parts = [part.values() if isinstance(part, dict) else part for part in layer]
            layer = [
                item for part in parts if not isinstance(part, str) and isinstance(part, Iterable) for item in part
            ]
        if layer:
            yield f"meta.{name} is nested more than {_DEEPEST} deep"
