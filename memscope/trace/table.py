"""The Trace: every allocation of a run, as columns. Recorders write a trace; everything else is a function of traces.

An allocation is one row. Time is counted in events: each birth and each death of an allocation is one event, so
`allocated` is a step function with one value after each event. Reading a trace needs neither torch nor a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from memscope.errors import TraceFileError, UsageError, nearest
from memscope.trace.columns import CATEGORIES, KEYS, PHASES, Bools, Category, Ints, Key, Phase
from memscope.trace.file import is_within, read_columns, write_columns
from memscope.trace.meta import damage_of_meta, damage_of_texts

__all__ = ["Peak", "Trace", "damage_of", "show_traces_with"]


class Peak(NamedTuple):
    """The moment with the most allocated memory; the first of several equal ones."""

    event: int
    allocated_bytes: int
    step: int
    phase: Phase
    micro_batch: int


@dataclass(frozen=True, eq=False)
class Trace:
    """All allocations of one run. `column[i]` belongs to allocation `i`, in order of birth.

    Columns are int64 arrays `[allocations]`; `category`, `module`, `op` and `phase` index `CATEGORIES`, `modules`,
    `ops` and `PHASES`. Each row of the `mark_*` columns `[marks]` is the start of a phase: its first event, the phase,
    the step and the micro-batch.

    Examples:
        >>> from memscope import simulate
        >>> from memscope.testing import toy_workload
        >>> trace = simulate(toy_workload)
        >>> sum(trace.by("category", at="peak").values()) == trace.peak.allocated_bytes
        True
        >>> trace.by("module", at="peak")["blocks.0.wq"] % 512  # sizes are blocks of the allocator
        0
        >>> len(trace.timeline("activation")) == trace.events
        True
    """

    size: Ints
    """Bytes the allocation takes on the device: `requested`, rounded up by the device's allocator."""
    requested: Ints
    """Bytes requested."""
    category: Ints
    module: Ints
    """Module that ran at its birth; in the backward pass, the module whose forward is being differentiated."""
    op: Ints
    phase: Ints
    step: Ints
    """Optimizer step it was born in, from 0; -1 before the first."""
    micro_batch: Ints
    born: Ints
    """Event of its birth."""
    freed: Ints
    """Event of its death; -1 if it is alive at the end."""
    mark_event: Ints
    mark_phase: Ints
    mark_step: Ints
    mark_micro_batch: Ints
    modules: tuple[str, ...]
    ops: tuple[str, ...]
    meta: Mapping[str, Any]
    """Target, strategies, device, versions, parameter counts, FLOPs and seconds of each step (JSON values)."""
    reserved: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Bytes the allocator has reserved after each event: int64 `[events]`; empty for a run without an allocator."""
    host: Trace | None = None
    """Memory of the host that the step on the GPU needs: copies of what was on the GPU, and what is computed from them.
    It has events, phases and steps of its own; `modules` and `ops` are those of the device. `size` is what PyTorch's
    allocator of pinned memory hands out, `reserved` what it and pageable copies hold. None: it was not followed."""

    def __len__(self) -> int:
        return len(self.size)

    def __repr__(self) -> str:
        start = f"<Trace of {self.meta.get('target', '?')}: {len(self):,} allocations"
        if not self.events:
            return f"{start}>"
        return f"{start}, peak {self.peak.allocated_bytes:,} bytes in {self.peak.phase}, step {self.peak.step}>"

    def __rich__(self) -> Any:
        return _views["rich"](self) if "rich" in _views else repr(self)

    def _repr_html_(self) -> str | None:
        return _views["html"](self) if "html" in _views else None

    @cached_property
    def events(self) -> int:
        """Number of events: births plus deaths."""
        return int(self.born.size + np.count_nonzero(self.freed >= 0))

    @cached_property
    def allocated(self) -> Ints:
        """Bytes allocated after each event: int64 `[events]`."""
        return self._timeline(np.ones(len(self), dtype=bool))

    def timeline(self, category: Category | None = None) -> Ints:
        """Bytes allocated after each event, of one category or of all categories: int64 `[events]`."""
        return self.allocated if category is None else self._timeline(self.category == _code(category))

    def _timeline(self, chosen: Bools) -> Ints:
        change = np.zeros(self.events, dtype=np.int64)
        change[self.born[chosen]] += self.size[chosen]
        died = chosen & (self.freed >= 0)
        change[self.freed[died]] -= self.size[died]
        return np.cumsum(change)

    @cached_property
    def peak(self) -> Peak:
        """The moment with the most allocated memory."""
        return self.peak_of()

    def peak_of(self, step: int | None = None) -> Peak:
        """The peak of one step, or of the whole run.

        Raises:
            UsageError: the trace is empty, has no such step, or has no event in that step.
        """
        if not self.events:
            raise UsageError("the trace is empty: without an allocation it has no peak")
        first, last = (0, self.events) if step is None else self.step_range(step)
        if first == last:
            raise UsageError(f"nothing was allocated or freed in step {step}, so it has no peak")
        event = first + int(np.argmax(self.allocated[first:last]))
        mark = self.mark_at(event)
        return Peak(
            event,
            int(self.allocated[event]),
            int(self.mark_step[mark]),
            PHASES[int(self.mark_phase[mark])],
            int(self.mark_micro_batch[mark]),
        )

    def mark_at(self, event: int) -> int:
        """Index of the mark whose phase contains an event."""
        return max(0, int(np.searchsorted(self.mark_event, event, side="right")) - 1)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps in the trace, in order."""
        return tuple(int(s) for s in np.unique(self.mark_step) if s >= 0)

    def step_range(self, step: int) -> tuple[int, int]:
        """Events of a step, as `(first, last + 1)`.

        Raises:
            UsageError: the trace has no such step.
        """
        marks = np.flatnonzero(self.mark_step == step)
        if not marks.size:
            raise UsageError(f"the trace has no step {step}; it has {', '.join(map(str, self.steps)) or 'none'}")
        after = int(marks[-1]) + 1
        last = int(self.mark_event[after]) if after < self.mark_event.size else self.events
        return int(self.mark_event[marks[0]]), last

    def at(self, event: int) -> Ints:
        """Indices of the allocations alive after an event, in order of birth.

        Raises:
            UsageError: the event is outside the trace.
        """
        if not 0 <= event < self.events:
            has = f"events 0 to {self.events - 1}" if self.events else "no events"
            raise UsageError(f"event {event} is outside the trace, which has {has}")
        return np.flatnonzero((self.born <= event) & ((self.freed > event) | (self.freed < 0)))

    def by(self, *keys: Key, at: int | Literal["peak"] = "peak") -> dict[Any, int]:
        """Bytes alive at an event, grouped by category, module, op, phase, step or micro_batch; largest first.

        The result maps the value of a single key, or a tuple of the values of several keys, to bytes.

        Raises:
            UsageError: a key is unknown, no key is given, or the event is outside the trace.
        """
        unknown = [key for key in keys if key not in KEYS]
        if unknown or not keys:
            name = unknown[0] if unknown else ""
            raise UsageError(f'cannot group a trace by "{name}": {nearest(name, KEYS)}')
        alive = self.at(self.peak.event if at == "peak" else at)
        groups, index = np.unique(np.stack([getattr(self, key)[alive] for key in keys]), axis=1, return_inverse=True)
        sizes = np.zeros(groups.shape[1], dtype=np.int64)
        np.add.at(sizes, index.reshape(-1), self.size[alive])
        found: dict[Any, int] = {}
        for codes, size in zip(groups.T, sizes, strict=True):
            names = tuple(self._name(key, int(code)) for key, code in zip(keys, codes, strict=True))
            group = names if len(keys) > 1 else names[0]
            found[group] = found.get(group, 0) + int(size)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _name(self, key: Key, code: int) -> str | int:
        tables: dict[Key, Sequence[str]] = {
            "category": CATEGORIES, "phase": PHASES, "module": self.modules, "op": self.ops
        }  # fmt: skip
        return tables[key][code] if key in tables else code

    def by_category(self, at: int | Literal["peak"] = "peak") -> dict[Category, int]:
        """Bytes of every category at an event, zeros included, in the order of `CATEGORIES`."""
        found = self.by("category", at=at)
        return {category: found.get(category, 0) for category in CATEGORIES}

    def max_by_category(self, step: int | None = None) -> dict[Category, int]:
        """Peak bytes of each category, in one step or in the whole run; categories may peak at different moments.

        Raises:
            UsageError: the trace has no such step.
        """
        first, last = (0, self.events) if step is None else self.step_range(step)
        return {c: int(self.timeline(c)[first:last].max(initial=0)) for c in CATEGORIES}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a compressed `.npz` file. The file is complete or absent: a failed write leaves nothing behind.

        Raises:
            TraceFileError: the file exists and `overwrite` is False, it cannot be written, or `meta` is not JSON or
                has a field that `load` would refuse.
        """
        path = Path(path)
        texts = {"modules": self.modules, "ops": self.ops, "meta": dict(self.meta)}
        if damage := damage_of_texts(texts):
            raise TraceFileError(f"{path}: cannot be written: {damage}")
        columns = {name: getattr(self, name) for name in _COLUMNS}
        if self.host is not None:
            columns |= {f"host_{name}": getattr(self.host, name) for name in _COLUMNS}
        write_columns(path, columns, texts, overwrite=overwrite)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace file. Nothing in the file is executed.

        Raises:
            TraceFileError: the file is missing, not a trace, truncated, inconsistent, or of a newer schema.
        """
        columns, of_host, header = read_columns(path, _COLUMNS)
        texts = {name: header[name] for name in _TEXTS if name in header}
        damage = damage_of_texts(texts)
        if not damage:
            modules, ops = tuple(texts["modules"]), tuple(texts["ops"])
            host = cls(**of_host, modules=modules, ops=ops, meta={}) if of_host else None
            trace = cls(**columns, modules=modules, ops=ops, meta=texts["meta"], host=host)
            damage = damage_of(trace)
        if damage:
            raise TraceFileError(f"{path}: a damaged memscope trace: {damage}")
        return trace


_TEXTS = ("modules", "ops", "meta")
_COLUMNS = tuple(field.name for field in fields(Trace) if field.name not in (*_TEXTS, "host"))
_views: dict[str, Callable[[Trace], Any]] = {}


def show_traces_with(*, rich: Callable[[Trace], Any], html: Callable[[Trace], str]) -> None:
    """Register how a terminal (rich) and a notebook (HTML) show a trace. Without a view, both show its `repr`."""
    _views.update(rich=rich, html=html)


def damage_of(trace: Trace) -> str:
    """The first inconsistency of a trace that was read from a file; empty if the trace is consistent."""
    of_host = _damage_of_columns(trace.host) if trace.host is not None else ""
    if of_host:
        return f"its host memory: {of_host}"
    return _damage_of_columns(trace) or damage_of_meta(
        trace.meta,
        steps=trace.steps,
        events=trace.events,
        modules=len(trace.modules),
        ops=len(trace.ops),
        has_allocator=bool(trace.reserved.size),
    )


def _damage_of_columns(trace: Trace) -> str:
    for name in _COLUMNS:
        like = "mark_event" if name.startswith("mark_") else "size"
        length, expected = len(getattr(trace, name)), len(getattr(trace, like))
        if name != "reserved" and length != expected:
            return f"its column {name} has {length:,} values: expected {expected:,}, as in {like}"
    if len(trace.reserved) not in (0, trace.events):
        return f"its column reserved has {len(trace.reserved):,} values: expected {trace.events:,}, or none"
    tables = {"category": CATEGORIES, "phase": PHASES, "module": trace.modules, "op": trace.ops, "mark_phase": PHASES}
    for name, table in tables.items():
        if not is_within(getattr(trace, name), 0, len(table) - 1):
            return f"its column {name} points outside its table"
    if len(trace) and not trace.mark_event.size:
        return "it has allocations but no phase"
    if not (is_within(trace.mark_event, 0, trace.events) and bool((np.diff(trace.mark_event) >= 0).all())):
        return "its phases are out of order"
    for name in ("size", "requested", "reserved"):
        column = getattr(trace, name)
        if bool((column < 0).any()):
            return f"its column {name} has a negative size"
        if name != "reserved" and float(column.sum(dtype=np.float64)) >= 2**63:
            return f"its column {name} has sizes that no device has"
    if bool((trace.requested > trace.size).any()):
        return "an allocation is smaller than its request"
    died = trace.freed >= 0
    ends = np.concatenate([trace.born, trace.freed[died]])
    in_order = bool((np.diff(trace.born) > 0).all()) and bool((trace.freed > trace.born)[died].all())
    if not in_order or not np.array_equal(np.sort(ends), np.arange(ends.size)):
        return "its events are not one unbroken sequence"
    return ""


def _code(category: str) -> int:
    if category not in CATEGORIES:
        raise UsageError(f'unknown category "{category}": {nearest(category, CATEGORIES)}')
    return CATEGORIES.index(category)
