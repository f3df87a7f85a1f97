"""Small traces, built by hand event by event, as a recorder would see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from memscope.trace import CATEGORIES, PHASES, Category, Phase, Trace

__all__ = ["TraceBuilder", "random_traces"]


class TraceBuilder:
    """Builds a trace. Each `new` and each `free` is one event; `phase` begins the phase of the events after it."""

    def __init__(self) -> None:
        self._allocations: list[dict[str, int]] = []
        self._marks: list[tuple[int, int, int, int]] = []
        self._modules: dict[str, int] = {}
        self._ops: dict[str, int] = {}
        self._events = 0

    def phase(self, name: Phase, step: int = -1, micro_batch: int = 0) -> None:
        self._marks.append((self._events, PHASES.index(name), step, micro_batch))

    def new(self, category: Category, size: int, *, module: str = "", op: str = "") -> int:
        """Add an allocation of `size` bytes, none of them from rounding; returns its index."""
        _, phase, step, micro_batch = self._marks[-1]
        self._allocations.append({
            "size": size, "requested": size, "category": CATEGORIES.index(category), "phase": phase, "step": step,
            "micro_batch": micro_batch, "born": self._events, "freed": -1,
            "module": self._modules.setdefault(module, len(self._modules)),
            "op": self._ops.setdefault(op, len(self._ops)),
        })  # fmt: skip
        self._events += 1
        return len(self._allocations) - 1

    def free(self, *allocations: int) -> None:
        for allocation in allocations:
            self._allocations[allocation]["freed"] = self._events
            self._events += 1

    def trace(self, meta: Mapping[str, Any] | None = None) -> Trace:
        names = ("size", "requested", "category", "module", "op", "phase", "step", "micro_batch", "born", "freed")
        columns = {name: _column([row[name] for row in self._allocations]) for name in names}
        marks = [_column([mark[i] for mark in self._marks]) for i in range(4)]
        return Trace(
            **columns, mark_event=marks[0], mark_phase=marks[1], mark_step=marks[2], mark_micro_batch=marks[3],
            modules=tuple(self._modules), ops=tuple(self._ops), meta=meta or {},
        )  # fmt: skip


def _column(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=5,
)


@st.composite
def random_traces(draw: st.DrawFn) -> Trace:
    """Allocations of any size, category and name, freed in any order or never; phases, steps and micro-batches change
    now and then, sometimes twice at one event."""
    builder, alive = TraceBuilder(), list[int]()
    builder.phase("setup")
    for _ in range(draw(st.integers(0, 40))):
        action = draw(st.sampled_from(["new", "new", "free", "phase"]))
        if action == "phase":
            builder.phase(draw(st.sampled_from(PHASES)), draw(st.integers(-1, 3)), draw(st.integers(0, 200)))
        elif action == "free" and alive:
            builder.free(alive.pop(draw(st.integers(0, len(alive) - 1))))
        else:
            category, size = draw(st.sampled_from(CATEGORIES)), draw(st.integers(0, 2**40))
            module, op = (draw(st.sampled_from(["", "a", "layers.0.é", "\0", '"'])) for _ in range(2))
            alive.append(builder.new(category, size, module=module, op=op))
    return builder.trace(draw(st.dictionaries(st.text(), _JSON, max_size=3)))
