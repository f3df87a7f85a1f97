"""Compare two traces by category, module and allocation, at the peak and per step.

Each run is taken at its own peak. The allocations alive there are matched: among those of the same category, module,
operator and phase, first by size, then the remaining ones in order of birth. So every table sums to the difference of
the two peaks, and a trace does not differ from itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from memscope.analysis.alive import together
from memscope.analysis.host import host_peak
from memscope.errors import UsageError
from memscope.trace import CATEGORIES, PHASES, Category, Ints, Peak, Phase, Trace

__all__ = [
    "AllocationChange",
    "Change",
    "ChangeKind",
    "Difference",
    "Setting",
    "StepChange",
    "changed_settings",
    "diff",
]

ChangeKind = Literal["grew", "shrank", "new", "gone", "now alive", "no longer alive", "other lifetime"]
"""`new` and `gone`: only one of the runs makes such an allocation. `now alive` and `no longer alive`: both runs make
it, but it is alive only at the peak of the second, or only of the first. `other lifetime`: equal size, but freed in
another phase."""
_KINDS: tuple[ChangeKind, ...] = get_args(ChangeKind)
_GREW, _SHRANK, _NEW, _GONE, _NOW, _NO_LONGER, _OTHER_LIFETIME = range(len(_KINDS))
_NEVER = len(PHASES)
"""In place of the phase of a death: alive at the end."""
_SETTINGS = ("target", "strategies", "device", "versions", "settings", "parameters", "capacity")


@dataclass(frozen=True)
class Change:
    """Bytes before (in the first trace) and after (in the second)."""

    before: int
    after: int

    @property
    def change(self) -> int:
        """Bytes added; negative if memory shrank."""
        return self.after - self.before


@dataclass(frozen=True)
class AllocationChange(Change):
    """Allocations that changed in the same way; modules that differ only in a layer's index are merged."""

    kind: ChangeKind
    count: int
    category: Category
    module: str
    """Module of one or more layers, such as `layers.*.wq`."""
    op: str
    phase: Phase
    """Phase of their birth."""
    freed_before: str
    """Phase of their death in the first trace; `the end` if never freed, empty if not alive at the peak."""
    freed_after: str
    """The same in the second trace."""


@dataclass(frozen=True)
class StepChange(Change):
    """The peak of one step. The categories are taken at each run's own peak of that step, and sum to it."""

    step: int
    categories: Mapping[str, Change]


@dataclass(frozen=True)
class Setting:
    """A setting or property that differs between the traces, and may explain the change."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Difference:
    """The differences between two traces, largest first; unchanged entries are left out."""

    peak: Change
    peak_before: Peak
    peak_after: Peak
    categories: Mapping[str, Change]
    modules: Mapping[str, Change]
    """By module; names that differ only in a layer's index are merged."""
    allocations: tuple[AllocationChange, ...]
    steps: tuple[StepChange, ...]
    """Steps of both traces whose peak, or the categories at the peak, changed."""
    settings: tuple[Setting, ...]
    same_target: bool
    """Whether both traces are of one target; modules of different targets may have different names."""
    host: Change = Change(0, 0)
    """The peaks on the host."""

    def __bool__(self) -> bool:
        return bool(self.categories or self.modules or self.allocations or self.steps or self.host.change)


def diff(before: Trace, after: Trace) -> Difference:
    """Compare two traces, each at its own peak.

    Raises:
        UsageError: a trace is empty.
    """
    at_peak = before.at(before.peak.event), after.at(after.peak.event)
    keys = _keys(before, after)
    return Difference(
        peak=Change(before.peak.allocated_bytes, after.peak.allocated_bytes),
        peak_before=before.peak,
        peak_after=after.peak,
        categories=_changes(before.by_category(), after.by_category()),
        modules=_changes(_by_module(before, at_peak[0]), _by_module(after, at_peak[1])),
        allocations=_allocations((before, after), at_peak, keys),
        steps=tuple(_steps(before, after)),
        settings=changed_settings(before, after),
        same_target=before.meta.get("target") == after.meta.get("target"),
        host=Change(*(peak.allocated_bytes if (peak := host_peak(trace)) else 0 for trace in (before, after))),
    )


def _changes(before: Mapping[Any, int], after: Mapping[Any, int]) -> dict[str, Change]:
    found = {name: Change(before.get(name, 0), after.get(name, 0)) for name in [*before, *(after.keys() - before)]}
    changed = {name: change for name, change in found.items() if change.change}
    return dict(sorted(changed.items(), key=lambda item: (-abs(item[1].change), item[0])))


def _by_module(trace: Trace, alive: Ints) -> dict[str, int]:
    sizes = np.zeros(len(trace.modules), dtype=np.int64)
    np.add.at(sizes, trace.module[alive], trace.size[alive])
    found: dict[str, int] = {}
    for name, size_bytes in zip(trace.modules, sizes.tolist(), strict=True):
        found[together(name)] = found.get(together(name), 0) + size_bytes
    return found


def _steps(before: Trace, after: Trace) -> Iterable[StepChange]:
    for step in sorted({*before.steps} & {*after.steps}):
        first, second = _step(before, step), _step(after, step)
        if first and second:
            categories = _changes(first[1], second[1])
            if categories:
                yield StepChange(first[0], second[0], step, categories)


def _step(trace: Trace, step: int) -> tuple[int, dict[Category, int]] | None:
    """The peak of a step and its categories; None for a step without events."""
    try:
        peak = trace.peak_of(step)
    except UsageError:
        return None
    return peak.allocated_bytes, trace.by_category(at=peak.event)


def changed_settings(before: Trace, after: Trace) -> tuple[Setting, ...]:
    """The settings that differ: target, strategies, device, versions, settings of the target and of the allocator."""
    first, second = _settings(before), _settings(after)
    return tuple(
        Setting(name, first.get(name), second.get(name))
        for name in [*first, *(name for name in second if name not in first)]
        if first.get(name) != second.get(name)
    )


def _settings(trace: Trace) -> dict[str, Any]:
    meta, found = trace.meta, dict[str, Any]()
    allocator = meta.get("allocator")
    tables: dict[str, Any] = {name: meta.get(name) for name in _SETTINGS}
    tables["allocator"] = allocator.get("settings") if isinstance(allocator, dict) else None
    for name, value in tables.items():
        if isinstance(value, dict):
            found |= {f"{name}: {key}": item for key, item in value.items()}
        elif value is not None:
            found[name] = value
    return found | {"steps": len(trace.steps)}


def _keys(before: Trace, after: Trace) -> tuple[Ints, Ints]:
    """A number for every allocation of both traces, equal if category, module, operator and phase are equal."""
    modules = {name: code for code, name in enumerate(dict.fromkeys((*before.modules, *after.modules)))}
    ops = {name: code for code, name in enumerate(dict.fromkeys((*before.ops, *after.ops)))}

    def keys(trace: Trace) -> Ints:
        module = np.array([modules[name] for name in trace.modules], dtype=np.int64)[trace.module]
        op = np.array([ops[name] for name in trace.ops], dtype=np.int64)[trace.op]
        key: Ints = ((module * len(ops) + op) * len(PHASES) + trace.phase) * len(CATEGORIES) + trace.category
        return key

    return keys(before), keys(after)


def _allocations(
    traces: tuple[Trace, Trace], at_peak: tuple[Ints, Ints], keys: tuple[Ints, Ints]
) -> tuple[AllocationChange, ...]:
    before, after = traces
    here, there = at_peak
    sizes = np.unique(np.concatenate([before.size, after.size]))
    sized = _joined(keys[0], before.size, sizes), _joined(keys[1], after.size, sizes)
    one, other = _pairs(sized[0][here], sized[1][there])
    same = here[one], there[other]
    here, there = np.delete(here, one), np.delete(there, other)
    one, other = _pairs(keys[0][here], keys[1][there])
    resized = here[one], there[other]
    here, there = np.delete(here, one), np.delete(there, other)
    # An allocation's category depends on its lifetime: one that both runs make may have a different category in each.
    made = [_joined(key // len(CATEGORIES), trace.size, sizes) for key, trace in zip(keys, traces, strict=True)]
    ends = _ends(before), _ends(after)
    moved = ends[0][same[0]] != ends[1][same[1]]
    parts = [
        (same[0][moved], same[1][moved], np.full(np.count_nonzero(moved), _OTHER_LIFETIME)),
        (*resized, np.where(after.size[resized[1]] > before.size[resized[0]], _GREW, _SHRANK)),
        (here, np.full(here.size, -1), np.where(np.isin(made[0][here], made[1]), _NO_LONGER, _GONE)),
        (np.full(there.size, -1), there, np.where(np.isin(made[1][there], made[0]), _NOW, _NEW)),
    ]
    rows = [np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True)]
    return _together(traces, ends, rows[0], rows[1], rows[2])


def _joined(key: Ints, value: Ints, values: Ints) -> Ints:
    """Combine a key and a value into one number; `values` are all values, sorted."""
    number: Ints = key * len(values) + np.searchsorted(values, value)
    return number


def _pairs(before: Ints, after: Ints) -> tuple[Ints, Ints]:
    """Positions of equal keys: the first occurrence with the first, the second with the second, and so on."""
    _, codes = np.unique(np.concatenate([before, after]), return_inverse=True)  # small enough to multiply below
    first, second = codes[: before.size], codes[before.size :]
    most = max(before.size, after.size)
    _, one, other = np.intersect1d(
        first * most + _occurrence(first), second * most + _occurrence(second), assume_unique=True, return_indices=True
    )
    return one, other


def _occurrence(keys: Ints) -> Ints:
    """Number of earlier occurrences of each key: int64 `[keys]`."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    counted = np.empty(keys.size, dtype=np.int64)
    counted[order] = np.arange(keys.size) - np.repeat(starts, np.diff(starts, append=keys.size))
    return counted


def _ends(trace: Trace) -> Ints:
    """Phase in which each allocation is freed; `_NEVER` if it is alive at the end."""
    marks = np.maximum(np.searchsorted(trace.mark_event, trace.freed, side="right") - 1, 0)
    ends: Ints = np.where(trace.freed < 0, _NEVER, trace.mark_phase[marks])
    return ends


def _together(
    traces: tuple[Trace, Trace], ends: tuple[Ints, Ints], here: Ints, there: Ints, kind: Ints
) -> tuple[AllocationChange, ...]:
    """Merge changes of the same kind, category, module (of any layer), operator and phases; row -1: no allocation."""
    found: dict[tuple[Any, ...], npt.NDArray[np.int64]] = {}
    before, after = traces
    for row_before, row_after, code in zip(here.tolist(), there.tolist(), kind.tolist(), strict=True):
        trace, row = (after, row_after) if row_after >= 0 else (before, row_before)
        group = (
            _KINDS[code],
            CATEGORIES[int(trace.category[row])],
            together(trace.modules[int(trace.module[row])]),
            trace.ops[int(trace.op[row])],
            PHASES[int(trace.phase[row])],
            _phase_of(ends[0], row_before),
            _phase_of(ends[1], row_after),
        )
        sums = found.setdefault(group, np.zeros(3, dtype=np.int64))
        sums += (1, _size_of(before, row_before), _size_of(after, row_after))
    changes = (
        AllocationChange(int(old), int(new), kind, int(count), category, module, op, phase, end_before, end_after)
        for (kind, category, module, op, phase, end_before, end_after), (count, old, new) in found.items()
    )
    return tuple(sorted(changes, key=lambda c: (-abs(c.change), c.kind, c.module, c.op)))


def _size_of(trace: Trace, row: int) -> int:
    return int(trace.size[row]) if row >= 0 else 0


def _phase_of(ends: Ints, row: int) -> str:
    if row < 0:
        return ""
    end = int(ends[row])
    return "the end" if end == _NEVER else PHASES[end]
