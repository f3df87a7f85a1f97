"""The Trace: every allocation of a run, as columns. Recorders write it; everything else is a function of it.

An allocation is one row. Time is counted in events: each birth and each death of an allocation is one event, so
`allocated` is a step function with one value after each event. A trace needs neither torch nor a GPU to be read.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from memscope.errors import TraceFileError, UsageError, nearest

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "CATEGORIES", "MARK_COLUMNS", "PHASES", "SCHEMA_VERSION", "Category", "Peak", "Phase", "Trace", "columns_of",
    "damage_of", "write_whole",
]  # fmt: skip

SCHEMA_VERSION = 1
_FORMAT = "memscope-trace"

Category = Literal[
    "parameter", "weight_copy", "buffer", "gradient", "optimizer_state", "activation", "input", "temporary",
    "workspace", "other",
]  # fmt: skip
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""What memory is for. `weight_copy`: a cast of a parameter. `activation`: made by the forward pass (or its
recomputation) and still alive when the backward pass that needs it begins. `temporary`: freed before that.
`workspace`: taken inside a kernel. `other`: outlives its step without any known owner."""

Phase = Literal["setup", "forward", "loss", "backward", "recompute", "optimizer", "zero_grad", "outside"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""When. `recompute` is forward work done again inside the backward pass by activation checkpointing; `outside` is
between steps and, in a loop that does not say its phases, between forward, backward and optimizer."""

Ints = npt.NDArray[np.int64]
Key = Literal["category", "module", "op", "phase", "step", "micro_batch"]
KEYS: tuple[Key, ...] = get_args(Key)


class Peak(NamedTuple):
    """The moment with the most allocated memory: the first one, if several are equal."""

    event: int
    allocated_bytes: int
    step: int
    phase: Phase
    micro_batch: int


@dataclass(frozen=True, eq=False)
class Trace:
    """All allocations of one run. Column `x[i]` belongs to allocation `i`, in order of birth.

    Columns are int64 arrays `[allocations]`; `category`, `module`, `op` and `phase` index `CATEGORIES`, `modules`,
    `ops` and `PHASES`. The `mark_*` columns `[marks]` say when (first event) a new phase began, and which.

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
    """Bytes the allocation takes on the device: `requested`, rounded as the device's allocator does."""
    requested: Ints
    """Bytes that were asked for."""
    category: Ints
    module: Ints
    """Module at work when it was born; in the backward pass: the module whose forward is being differentiated."""
    op: Ints
    phase: Ints
    step: Ints
    """Optimizer step it was born in, from 0; -1 before the first."""
    micro_batch: Ints
    born: Ints
    """Event of its birth."""
    freed: Ints
    """Event of its death; -1 when it is alive at the end."""
    mark_event: Ints
    mark_phase: Ints
    mark_step: Ints
    mark_micro_batch: Ints
    modules: tuple[str, ...]
    ops: tuple[str, ...]
    meta: Mapping[str, Any]
    """Target, strategies, device, versions, parameter counts, FLOPs and seconds of each step (JSON values)."""
    reserved: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Bytes the allocator holds from the device after each event: int64 `[events]`; empty where there is none."""

    def __len__(self) -> int:
        return len(self.size)

    def __repr__(self) -> str:
        start = f"<Trace of {self.meta.get('target', '?')}: {len(self):,} allocations"
        if not self.events:
            return f"{start}>"
        return f"{start}, peak {self.peak.allocated_bytes:,} bytes in {self.peak.phase}, step {self.peak.step}>"

    def __rich__(self) -> Table:
        from memscope.summary import trace_table

        return trace_table(self)

    def _repr_html_(self) -> str:
        from memscope.summary import notebook_html

        return notebook_html(self.__rich__())

    @cached_property
    def events(self) -> int:
        """Number of events: births plus deaths."""
        return int(self.born.size + np.count_nonzero(self.freed >= 0))

    @cached_property
    def allocated(self) -> Ints:
        """Bytes allocated after each event: int64 `[events]`."""
        return self._timeline(np.ones(len(self), dtype=bool))

    def timeline(self, category: Category | None = None) -> Ints:
        """Bytes allocated after each event, of one category or of all: int64 `[events]`."""
        return self.allocated if category is None else self._timeline(self.category == _code(category))

    def _timeline(self, chosen: npt.NDArray[np.bool_]) -> Ints:
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
            UsageError: when the trace is empty, or has no such step or no event in it.
        """
        if not self.events:
            raise UsageError("the trace is empty: it has no allocation, so it has no peak")
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
        """Index of the mark (phase) that an event falls into."""
        return max(0, int(np.searchsorted(self.mark_event, event, side="right")) - 1)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps in the trace, in order."""
        return tuple(int(s) for s in np.unique(self.mark_step) if s >= 0)

    def step_range(self, step: int) -> tuple[int, int]:
        """`(first, last + 1)` events of a step.

        Raises:
            UsageError: when the trace has no such step.
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
            UsageError: when the event is outside the trace.
        """
        if not 0 <= event < self.events:
            has = f"events 0 to {self.events - 1}" if self.events else "no events"
            raise UsageError(f"event {event} is outside the trace: it has {has}")
        return np.flatnonzero((self.born <= event) & ((self.freed > event) | (self.freed < 0)))

    def by(self, *keys: Key, at: int | Literal["peak"] = "peak") -> dict[Any, int]:
        """Bytes alive at a moment, grouped by category, module, op, phase, step or micro_batch; largest first.

        With one key the result maps its value, with several a tuple of values, to bytes.

        Raises:
            UsageError: for an unknown key, no key, or an event outside the trace.
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
        """Bytes of every category at a moment, zeros included, in the order of `CATEGORIES`."""
        found = self.by("category", at=at)
        return {category: found.get(category, 0) for category in CATEGORIES}

    def max_by_category(self, step: int | None = None) -> dict[Category, int]:
        """Largest number of bytes each category reaches, in one step or in the whole run; not all at the same moment.

        Raises:
            UsageError: when the trace has no such step.
        """
        first, last = (0, self.events) if step is None else self.step_range(step)
        return {c: int(self.timeline(c)[first:last].max(initial=0)) for c in CATEGORIES}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a compressed `.npz`: to a temporary file first, then renamed, so a broken write leaves nothing behind.

        Raises:
            TraceFileError: when the file exists and `overwrite` is False, it cannot be written, or `meta` is not JSON.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise TraceFileError(f"{path} exists already: choose another name, or overwrite it with -f")
        texts = {"modules": self.modules, "ops": self.ops, "meta": dict(self.meta)}
        try:
            header = json.dumps({"format": _FORMAT, "schema_version": SCHEMA_VERSION} | texts)
        except (TypeError, ValueError) as error:
            raise TraceFileError(f"{path}: cannot be written: meta holds more than JSON values ({error})") from None
        buffer = io.BytesIO()
        columns: dict[str, Any] = {name: _narrow(getattr(self, name)) for name in _COLUMNS}
        np.savez_compressed(buffer, header=np.array(header), **columns)
        write_whole(path, buffer.getvalue())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace file; nothing in it is ever executed.

        Raises:
            TraceFileError: when the file is missing, not a trace, truncated, inconsistent, or of a newer schema.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            raise TraceFileError(f"{path}: no such file") from None
        except OSError as error:
            raise TraceFileError(f"{path}: cannot be read ({error.strerror or error})") from None
        except Exception:  # zipfile, zlib and NumPy raise nearly anything on bytes they did not write
            raise TraceFileError(
                f"{path}: not a memscope trace, or truncated; expected a file written by memscope profile"
            ) from None
        return _from_arrays(path, arrays)


_TEXTS: dict[str, type] = {"modules": list, "ops": list, "meta": dict}
_COLUMNS = tuple(field.name for field in fields(Trace) if field.name not in _TEXTS)
MARK_COLUMNS = ("mark_event", "mark_phase", "mark_step", "mark_micro_batch")


def columns_of(names: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Ints]:
    """Rows of integers, each in the order of `names`, as columns by name: int64 `[rows]`, empty where there is none."""
    table = np.array(rows, dtype=np.int64).reshape(-1, len(names)).T
    return {name: np.ascontiguousarray(column) for name, column in zip(names, table, strict=True)}


def _from_arrays(path: str | os.PathLike[str], arrays: dict[str, npt.NDArray[Any]]) -> Trace:
    try:
        header = json.loads(str(arrays["header"]))
        if header["format"] != _FORMAT:
            raise KeyError("format")
        version = int(header["schema_version"])
    except (KeyError, ValueError, TypeError):
        raise TraceFileError(f"{path}: not a memscope trace: it has no memscope header") from None
    if version > SCHEMA_VERSION:
        raise TraceFileError(
            f"{path}: written with trace schema {version}, this memscope reads up to {SCHEMA_VERSION}: upgrade memscope"
        )
    wrong = [n for n in _COLUMNS if n not in arrays or arrays[n].dtype.kind != "i" or arrays[n].ndim != 1]
    wrong += [name for name, kind in _TEXTS.items() if not isinstance(header.get(name), kind)]
    if wrong:
        raise TraceFileError(f"{path}: a damaged memscope trace: {', '.join(wrong)} missing or of a wrong type")
    columns = {name: arrays[name].astype(np.int64) for name in _COLUMNS}
    modules, ops = (tuple(map(str, header[name])) for name in ("modules", "ops"))
    trace = Trace(**columns, modules=modules, ops=ops, meta=header["meta"])
    damage = damage_of(trace)
    if damage:
        raise TraceFileError(f"{path}: a damaged memscope trace: {damage}")
    return trace


def damage_of(trace: Trace) -> str:
    """What is inconsistent about a trace that was read from a file; empty when nothing is."""
    lengths = {len(getattr(trace, name)) for name in _COLUMNS if not name.startswith("mark_") and name != "reserved"}
    marks = {len(getattr(trace, name)) for name in _COLUMNS if name.startswith("mark_")}
    if len(lengths) != 1 or len(marks) != 1 or len(trace.reserved) not in (0, trace.events):
        return "columns differ in length"
    tables = {"category": CATEGORIES, "phase": PHASES, "module": trace.modules, "op": trace.ops, "mark_phase": PHASES}
    for name, table in tables.items():
        if not _within(getattr(trace, name), 0, len(table) - 1):
            return f"column {name} points outside its table"
    if len(trace) and not trace.mark_event.size:
        return "it has allocations but no phase"
    if not (_within(trace.mark_event, 0, trace.events) and bool((np.diff(trace.mark_event) >= 0).all())):
        return "its phases are not in the order of its events"
    if bool((trace.size < 0).any()):
        return "an allocation has a negative size"
    died = trace.freed >= 0
    ends = np.concatenate([trace.born, trace.freed[died]])
    in_order = bool((np.diff(trace.born) > 0).all()) and bool((trace.freed > trace.born)[died].all())
    if not in_order or not np.array_equal(np.sort(ends), np.arange(ends.size)):
        return "its events are not one unbroken sequence"
    return ""


def _within(column: Ints, least: int, most: int) -> bool:
    return not column.size or bool(least <= column.min() and column.max() <= most)


def _narrow(column: Ints) -> npt.NDArray[Any]:
    """The smallest signed type that holds a column: files stay small, values stay exact."""
    for dtype in (np.int8, np.int16, np.int32):
        if _within(column, np.iinfo(dtype).min, np.iinfo(dtype).max):
            return column.astype(dtype)
    return column


def _code(category: str) -> int:
    if category not in CATEGORIES:
        raise UsageError(f'unknown category "{category}": {nearest(category, CATEGORIES)}')
    return CATEGORIES.index(category)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely or not at all: to a temporary neighbour, then rename.

    Raises:
        TraceFileError: when the folder is missing or not writable, or the disk is full.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
