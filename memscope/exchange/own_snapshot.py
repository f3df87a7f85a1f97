"""Encoding and decoding of a trace in the snapshots that memscope writes.

Every allocation carries its trace columns as frames of its stack, where PyTorch's viewer shows them:

    memscope/op:0:aten.mm.default
    memscope/module:0:layers.3.attention.wq
    memscope/category:0:activation
    memscope/phase:0:forward
    memscope/step:1:step
    memscope/micro_batch:0:micro-batch
    memscope/size:4096:bytes of its block

Changes of phase, and allocations of zero bytes, which PyTorch's allocator does not see, are entries of the kind
"snapshot", which has no effect in a viewer. Data of the whole run is stored under the key "memscope", the metadata as
JSON text: a pickle can share one list many times over, and JSON cannot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from memscope.errors import excerpt
from memscope.exchange.layout import damaged
from memscope.trace import CATEGORIES, MARK_COLUMNS, PHASES, Ints, Trace, columns_of, damage_of, damage_of_texts

__all__ = ["OwnFrames", "about_run", "decode", "is_own"]

_KEY, _SCHEMA_VERSION = "memscope", 2
_ROW = ("size", "requested", "category", "module", "op", "phase", "step", "micro_batch", "born")
Frame: TypeAlias = dict[str, Any]


class OwnFrames:
    """Makes the stacks of a trace; equal frames share one object, and so do equal stacks."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._frames: dict[tuple[str, int, str], Frame] = {}
        self._stacks: dict[tuple[int, ...], list[Frame]] = {}

    def of_allocation(self, row: int) -> list[Frame]:
        """Return the stack of an allocation."""
        trace = self._trace
        columns = (trace.op, trace.module, trace.category, trace.phase, trace.step, trace.micro_batch, trace.size)
        key = tuple(int(column[row]) for column in columns)
        if key not in self._stacks:
            op, module, category, phase, step, micro_batch, size = key
            self._stacks[key] = [
                self._frame("op", 0, trace.ops[op]),
                self._frame("module", 0, trace.modules[module]),
                self._frame("category", 0, CATEGORIES[category]),
                *self._when(phase, step, micro_batch),
                self._frame("size", size, "bytes of its block"),
            ]
        return self._stacks[key]

    def of_mark(self, mark: int) -> list[Frame]:
        """Return the stack of a change of phase."""
        trace = self._trace
        return self._when(*(int(c[mark]) for c in (trace.mark_phase, trace.mark_step, trace.mark_micro_batch)))

    def of_empty(self, row: int, *, freed: bool) -> list[Frame]:
        """Return the stack of an allocation of zero bytes, or of its free."""
        if freed:
            return [{"filename": "memscope/freed", "line": row, "name": "of no bytes"}]
        return [*self.of_allocation(row), {"filename": "memscope/empty", "line": row, "name": "of no bytes"}]

    def _when(self, phase: int, step: int, micro_batch: int) -> list[Frame]:
        return [
            self._frame("phase", 0, PHASES[phase]),
            self._frame("step", step, "step"),
            self._frame("micro_batch", micro_batch, "micro-batch"),
        ]

    def _frame(self, what: str, line: int, name: str) -> Frame:
        key = (what, line, name)
        return self._frames.setdefault(key, {"filename": f"memscope/{what}", "line": line, "name": name})


def about_run(trace: Trace, replayed: Ints) -> dict[str, Any]:
    """Return the data of the whole run, and the reserved bytes if they differ from the snapshot's own segments."""
    meta = json.dumps(dict(trace.meta))
    about: dict[str, Any] = {"schema_version": _SCHEMA_VERSION, "meta": meta, "reserved": None}
    if not np.array_equal(trace.reserved, replayed):
        changes = np.flatnonzero(np.diff(trace.reserved, prepend=0))
        about["reserved"] = [[event, int(trace.reserved[event])] for event in changes.tolist()]
    return {_KEY: about}


def is_own(data: Any) -> bool:
    """Whether memscope wrote a snapshot."""
    return isinstance(data, dict) and isinstance(data.get(_KEY), dict)


def decode(data: Mapping[str, Any]) -> Trace:
    """Return the trace from which a snapshot was written.

    Raises:
        TraceFileError: the snapshot was changed since, or written by a newer memscope; the message does not name the
            file.
    """
    about = data[_KEY]
    version = about.get("schema_version")
    if version != _SCHEMA_VERSION:
        fix = "upgrade memscope" if type(version) is int and version > _SCHEMA_VERSION else "export the trace again"
        damaged(f"memscope wrote it with schema {excerpt(version)}, but this version reads {_SCHEMA_VERSION}: {fix}")
    reader = _Reader()
    try:
        meta = json.loads(about["meta"])
        for entry in data["device_traces"][0]:
            reader.read(entry)
        changed = damage_of_texts({"modules": reader.modules, "ops": reader.ops, "meta": meta})
        if not changed:
            trace = reader.trace(meta, about["reserved"])
            changed = damage_of(trace)
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        changed = f"{type(error).__name__}: {excerpt(str(error))}"
    if changed:
        damaged(f"memscope wrote it, but it was changed afterwards ({changed})")
    return trace


class _Reader:
    """Collects the rows and marks of a trace from a snapshot's entries."""

    def __init__(self) -> None:
        self._rows: list[list[int]] = []
        self._freed: list[int] = []
        self._marks: list[list[int]] = []
        self._alive: dict[int, int] = {}
        self._empty: dict[int, int] = {}
        self._modules: dict[str, int] = {}
        self._ops: dict[str, int] = {}
        self._reserved: list[int] = []
        self._held = 0

    def read(self, entry: Mapping[str, Any]) -> None:
        action = entry["action"]
        if action == "alloc":
            self._alive[entry["addr"]] = self._bear(entry)
        elif action == "free_requested":
            self._end(self._alive.pop(entry["addr"]))
        elif action == "snapshot":
            self._note(entry)
        elif action in ("segment_alloc", "segment_map"):
            self._held += _whole(entry["size"])
        elif action in ("segment_free", "segment_unmap"):
            self._held -= _whole(entry["size"])

    def _note(self, entry: Mapping[str, Any]) -> None:
        known = _known(entry)
        if "empty" in known:
            self._empty[known["empty"]["line"]] = self._bear(entry)
        elif "freed" in known:
            self._end(self._empty.pop(known["freed"]["line"]))
        elif "phase" in known:
            self._marks.append([len(self._reserved), *_when(known)])

    def _bear(self, entry: Mapping[str, Any]) -> int:
        known = _known(entry)
        module, op = (known[key]["name"] for key in ("module", "op"))
        self._rows.append([
            _whole(known["size"]["line"]), _whole(entry["size"]), CATEGORIES.index(known["category"]["name"]),
            self._modules.setdefault(module, len(self._modules)), self._ops.setdefault(op, len(self._ops)),
            *_when(known), len(self._reserved),
        ])  # fmt: skip
        self._freed.append(-1)
        self._reserved.append(self._held)
        return len(self._rows) - 1

    def _end(self, row: int) -> None:
        self._freed[row] = len(self._reserved)
        self._reserved.append(self._held)

    @property
    def modules(self) -> list[str]:
        return list(self._modules)

    @property
    def ops(self) -> list[str]:
        return list(self._ops)

    def trace(self, meta: Mapping[str, Any], reserved: list[list[int]] | None) -> Trace:
        return Trace(
            **columns_of(_ROW, self._rows),
            freed=np.array(self._freed, dtype=np.int64),
            **columns_of(MARK_COLUMNS, self._marks),
            modules=tuple(self._modules),
            ops=tuple(self._ops),
            meta=meta,
            reserved=self._reserved_as(reserved),
        )

    def _reserved_as(self, changes: list[list[int]] | None) -> Ints:
        if changes is None:
            return np.array(self._reserved, dtype=np.int64)
        if not changes:
            return np.zeros(0, dtype=np.int64)
        rows = [(_whole(event), _whole(size)) for event, size in changes]
        events, sizes = np.array([(0, 0), *rows], dtype=np.int64).T
        if (np.diff(events[1:], prepend=-1) <= 0).any() or events[-1] >= len(self._reserved):
            raise ValueError("its reserved bytes change at events out of order")
        return np.repeat(sizes, np.diff(events, append=len(self._reserved)))


def _known(entry: Mapping[str, Any]) -> dict[str, Frame]:
    return {frame["filename"].removeprefix("memscope/"): frame for frame in entry.get("frames", ())}


def _when(known: Mapping[str, Frame]) -> list[int]:
    return [PHASES.index(known["phase"]["name"]), *(_whole(known[key]["line"]) for key in ("step", "micro_batch"))]


def _whole(value: Any) -> int:
    """A value that must be an integer; NumPy would follow lists, which a pickle can nest without end."""
    if type(value) is not int:
        raise TypeError(f"expected a whole number, not {excerpt(value)}")
    return value
