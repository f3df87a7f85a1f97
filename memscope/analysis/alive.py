"""The allocations alive at an event: the largest ones with their lifetimes, and sums over the modules of all layers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from memscope.trace import CATEGORIES, PHASES, Category, Phase, Trace

__all__ = ["Alive", "by_module_together", "largest", "occasion", "together"]

_INDEX = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Alive:
    """One allocation and its lifetime."""

    size_bytes: int
    category: Category
    module: str
    op: str
    born: int
    """Event of its birth."""
    born_in: str
    """`step 1 · forward · micro-batch 0`."""
    freed: int | None
    """Event of its death; None if it is alive at the end."""
    freed_in: str
    """`step 1 · backward`; empty if it is alive at the end."""

    @property
    def life(self) -> str:
        """The lifetime in events, such as `12 to 40` or `12 to the end`."""
        return f"{self.born:,} to {'the end' if self.freed is None else f'{self.freed:,}'}"


def occasion(step: int, phase: Phase, micro_batch: int | None = None) -> str:
    """Step, phase and micro-batch, as in `step 1 · backward · micro-batch 0`.

    Before the first step it is `setup` while a workload is built, `before step 0` in a program or a loop that is
    recorded, and there `before step 0 · inference` in a call of a model without gradients.
    """
    if step < 0:
        return {"setup": "setup", "outside": "before step 0"}.get(phase, f"before step 0 · {phase.replace('_', ' ')}")
    return f"step {step} · {phase.replace('_', ' ')}" + ("" if micro_batch is None else f" · micro-batch {micro_batch}")


def largest(trace: Trace, count: int, at: int | Literal["peak"] = "peak") -> tuple[Alive, ...]:
    """The largest allocations alive after an event, largest first; equal ones in order of birth.

    Raises:
        UsageError: the event is outside the trace.
    """
    alive = trace.at(trace.peak.event if at == "peak" else at)
    chosen = alive[np.argsort(-trace.size[alive], kind="stable")][:count]
    return tuple(_alive(trace, row) for row in chosen.tolist())


def _alive(trace: Trace, row: int) -> Alive:
    freed = int(trace.freed[row])
    mark = trace.mark_at(freed)
    return Alive(
        size_bytes=int(trace.size[row]),
        category=CATEGORIES[int(trace.category[row])],
        module=trace.modules[int(trace.module[row])],
        op=trace.ops[int(trace.op[row])],
        born=int(trace.born[row]),
        born_in=occasion(int(trace.step[row]), PHASES[int(trace.phase[row])], int(trace.micro_batch[row])),
        freed=freed if freed >= 0 else None,
        freed_in=occasion(int(trace.mark_step[mark]), PHASES[int(trace.mark_phase[mark])]) if freed >= 0 else "",
    )


def together(module: str) -> str:
    """Replace layer indices in a module's name by `*`: `layers.3.mlp` becomes `layers.*.mlp`."""
    return _INDEX.sub(".*", module)


def by_module_together(trace: Trace, at: int | Literal["peak"] = "peak") -> dict[str, int]:
    """Bytes alive at an event by module, largest first; names that differ only in a layer's index are merged.

    Raises:
        UsageError: the event is outside the trace.
    """
    sizes: dict[str, int] = {}
    for name, size_bytes in trace.by("module", at=at).items():
        alike = together(name)
        sizes[alike] = sizes.get(alike, 0) + size_bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
