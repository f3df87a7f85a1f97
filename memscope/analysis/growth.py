"""How memory changes from step to step: what stays allocated, and how much the allocator holds beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memscope.analysis.alive import together
from memscope.trace import CATEGORIES, PHASES, Category, Trace
from memscope.units import format_bytes

__all__ = ["Growing", "StepPeak", "about_steps", "chosen_steps", "growing", "has_steps_to_compare", "step_peaks"]

MOST_ALIKE = 3
"""Steps that are shown as they are; more make a table and a chart."""
_LEAST_STEPS = 3
"""Consecutive steps that must leave memory behind before it is called growth."""
_BOUNDED: tuple[Category, ...] = ("parameter", "optimizer_state")
"""Categories that belong to the weights: an optimizer creates the state of each weight once, in whatever step."""
_LONG_RUN = 1000
"""Steps after which growth that stays below `_NEGLIGIBLE` of the peak is not mentioned, such as a list of losses."""
_NEGLIGIBLE = 0.01
_WORTH_SAYING = 0.02
"""Least change of reserved memory, as a share of it, that is called fragmentation."""
_SEGMENT_BYTES = 20 * 2**20
"""Reserved memory grows by segments of this size or more (kLargeBuffer in c10/cuda/CUDACachingAllocator.h): less is no
fragmentation."""
_OUTSIDE = [PHASES.index(name) for name in ("outside", "inference")]


@dataclass(frozen=True)
class StepPeak:
    """The highest memory of one step, and of what follows it up to the next, such as an evaluation."""

    step: int
    allocated_bytes: int
    reserved_bytes: int | None
    """Most reserved bytes in the step; None for a run without an allocator that reserves."""
    unused_bytes: int | None
    """Bytes that the allocator held at the allocated peak beyond what was allocated: its cache, or fragments of it."""


@dataclass(frozen=True)
class Growing:
    """Allocations that several steps in a row have left behind."""

    category: Category
    module: str
    """Names that differ only in a layer's index are merged."""
    op: str
    steps: tuple[int, ...]
    """The steps that made them, without a gap."""
    size_bytes: int
    """Bytes that these steps have left."""

    @property
    def bytes_per_step(self) -> int:
        """Average bytes that a step leaves."""
        return self.size_bytes // len(self.steps)


def step_peaks(trace: Trace) -> tuple[StepPeak, ...]:
    """The highest memory of each step in which memory was allocated or freed."""
    found = []
    for step in trace.steps:
        first, last = trace.step_range(step)
        if first == last:
            continue
        event = first + int(np.argmax(trace.allocated[first:last]))
        allocated = int(trace.allocated[event])
        if trace.reserved.size:
            reserved, unused = int(trace.reserved[first:last].max()), int(trace.reserved[event]) - allocated
            found.append(StepPeak(step, allocated, reserved, unused))
        else:
            found.append(StepPeak(step, allocated, None, None))
    return tuple(found)


def growing(trace: Trace) -> tuple[Growing, ...]:
    """What grows from step to step, largest first: allocations that each of the last steps has left behind.

    An allocation is left behind if it is alive when the training part of the last step ends, and that is not the step
    that made it. At least three steps in a row, up to the last but one, must have left some of the same category,
    module and operator. What belongs to the weights does not count, nor what would be below 1 % of the peak after 1,000
    steps.
    """
    steps = [step for step in trace.steps if step < trace.steps[-1]]
    if len(steps) < _LEAST_STEPS:
        return ()
    alive = trace.at(_end_of_training(trace))
    left = alive[(trace.step[alive] >= 0) & (trace.step[alive] < trace.steps[-1])]
    sizes: dict[tuple[Category, str, str], dict[int, int]] = {}
    for row in left.tolist():
        category = CATEGORIES[int(trace.category[row])]
        if category not in _BOUNDED:
            group = category, together(trace.modules[int(trace.module[row])]), trace.ops[int(trace.op[row])]
            of_step = sizes.setdefault(group, {})
            step = int(trace.step[row])
            of_step[step] = of_step.get(step, 0) + int(trace.size[row])
    found = []
    for (category, module, op), of_step in sizes.items():
        run = _last_run(steps, of_step)
        one = Growing(category, module, op, run, sum(of_step[step] for step in run))
        if len(run) >= _LEAST_STEPS and one.bytes_per_step * _LONG_RUN >= _NEGLIGIBLE * trace.peak.allocated_bytes:
            found.append(one)
    return tuple(sorted(found, key=lambda one: -one.size_bytes))


def chosen_steps(trace: Trace, most: int = 8) -> tuple[tuple[StepPeak, ...], int]:
    """At most so many steps of a run, from the first to the last with even distances, and how many there are.

    The step with the most allocated memory, and that with the most reserved memory, are among them.
    """
    peaks = step_peaks(trace)
    chosen = {int(index) for index in np.linspace(0, len(peaks) - 1, min(most - 2, len(peaks)))}
    chosen.add(max(range(len(peaks)), key=lambda index: peaks[index].allocated_bytes))
    chosen.add(max(range(len(peaks)), key=lambda index: peaks[index].reserved_bytes or 0))
    return tuple(peaks[index] for index in sorted(chosen)), len(peaks)


def has_steps_to_compare(trace: Trace) -> bool:
    """Whether a run has more steps than can be shown as they are, and they differ: in peak memory, or by growth."""
    peaks = step_peaks(trace)[1:]  # the first step creates the optimizer state
    if len(peaks) < MOST_ALIKE:
        return False
    figures = [[one.allocated_bytes for one in peaks], [one.reserved_bytes or 0 for one in peaks]]
    return any(max(sizes) - min(sizes) > _NEGLIGIBLE * max(sizes) for sizes in figures) or bool(growing(trace))


def about_steps(trace: Trace) -> Iterator[str]:
    """Sentences on what stays from step to step, and on fragmentation that builds up."""
    found = growing(trace)
    for one in found[:3]:
        where = f"{one.category.replace('_', ' ')} of {one.module or '(no module)'}{f' ({one.op})' * bool(one.op)}"
        yield (
            f"memory grows from step to step: each of the steps {one.steps[0]} to {one.steps[-1]} leaves "
            f"{format_bytes(one.bytes_per_step)} allocated, {where}"
        )
    if rest := found[3:]:
        yield f"{len(rest)} more allocations grow, by {format_bytes(sum(one.bytes_per_step for one in rest))} a step"
    if found:
        yield "a list of losses or outputs keeps their memory: store loss.item(), or tensor.detach().cpu(), instead"
    if fragments := _fragments(trace):
        yield fragments


def _fragments(trace: Trace) -> str:
    """The growth of reserved memory that allocated memory does not explain, from the second step on."""
    peaks = [one for one in step_peaks(trace)[1:] if one.reserved_bytes is not None]
    if len(peaks) < MOST_ALIKE:
        return ""
    first, highest = peaks[0], max(peaks, key=lambda one: one.reserved_bytes or 0)
    allocated = max(one.allocated_bytes for one in peaks) - first.allocated_bytes
    most = highest.reserved_bytes or 0
    grown = most - (first.reserved_bytes or 0)
    if grown - allocated < max(_WORTH_SAYING * most, _SEGMENT_BYTES):
        return ""
    return (
        f"fragmentation builds up: reserved memory grows by {format_bytes(grown)} from step {first.step} to step "
        f"{highest.step}, the allocated peak by {format_bytes(allocated)}"
    )


def _end_of_training(trace: Trace) -> int:
    """The last event of the last step that is not after it: a program may free everything when it has trained."""
    first, last = trace.step_range(trace.steps[-1])
    ends = np.append(trace.mark_event[1:], trace.events)
    inside = (trace.mark_step == trace.steps[-1]) & ~np.isin(trace.mark_phase, _OUTSIDE) & (ends > trace.mark_event)
    return int(ends[inside].max(initial=min(first + 1, last))) - 1


def _last_run(steps: list[int], of_step: dict[int, int]) -> tuple[int, ...]:
    """The steps without a gap, up to the last one, that have left something."""
    run: list[int] = []
    for step in reversed(steps):
        if step not in of_step:
            break
        run.insert(0, step)
    return tuple(run)
