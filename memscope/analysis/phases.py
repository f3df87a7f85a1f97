"""The peak of each phase of a run, those outside the training steps included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from memscope.analysis.alive import occasion, together
from memscope.trace import CATEGORIES, PHASES, Phase, Trace
from memscope.units import format_bytes

__all__ = ["CallPeak", "PhasePeak", "about_phases", "call_peaks", "leaves_the_steps", "phase_peaks"]

_BESIDE_THE_STEPS: tuple[Phase, ...] = ("setup", "outside", "inference")
_INFERENCE = PHASES.index("inference")
_MOST_MODULES = 3
_LEAST_KEPT = 0.01
"""Least share of the peak of inference that is worth mentioning."""
_FEWEST_CALLS = 4
"""Calls of a model without gradients, as for as many tokens, from which on their memory is told call by call."""
_OF_NO_CALL = [CATEGORIES.index(name) for name in ("parameter", "weight_copy", "buffer", "workspace")]


@dataclass(frozen=True)
class PhasePeak:
    """The most memory that was in use during a phase, in any step; the first of several equal moments.

    A phase begins with the memory that the one before it has left: this is what `torch.cuda.max_memory_allocated()`
    would show if the peak were reset whenever a phase begins.
    """

    phase: Phase
    """`setup` is everything before the first step, except calls of a model without gradients."""
    step: int
    event: int
    allocated_bytes: int
    reserved_bytes: int | None
    """Most reserved bytes during the phase, in any step; None for a run without an allocator that reserves."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Of `inference`: what calls of a model without gradients keep for later calls, such as a KV cache, when that is
    most: bytes by module, largest first; names that differ only in a layer's index are merged."""

    @property
    def at(self) -> str:
        """The step: `step 3`, or `before step 0`."""
        return f"step {self.step}" if self.step >= 0 else "before step 0"


def phase_peaks(trace: Trace) -> tuple[PhasePeak, ...]:
    """The peak of every phase in which memory was allocated or freed, in the order of `PHASES`."""
    found: dict[Phase, PhasePeak] = {}
    for mark, first, last in _stretches(trace):
        begins = max(first - 1, 0)
        event = begins + int(np.argmax(trace.allocated[begins:last]))
        step, phase = int(trace.mark_step[mark]), PHASES[int(trace.mark_phase[mark])]
        if step < 0 and phase == "outside":
            phase = "setup"
        reserved = int(trace.reserved[begins:last].max()) if trace.reserved.size else None
        here = PhasePeak(phase, step, event, int(trace.allocated[event]), reserved)
        before = found.get(phase)
        if before is None or here.allocated_bytes > before.allocated_bytes:
            found[phase] = replace(here, reserved_bytes=_most(before, reserved))
        else:
            found[phase] = replace(before, reserved_bytes=_most(before, reserved))
    if "inference" in found:
        found["inference"] = replace(found["inference"], kept=_kept(trace))
    return tuple(found[phase] for phase in PHASES if phase in found)


@dataclass(frozen=True)
class CallPeak:
    """The memory of one call of a model without gradients, such as that for one generated token."""

    held_bytes: int
    """Allocated when it begins: the model, and what earlier calls have left."""
    allocated_bytes: int
    """The most that was allocated during the call."""


def call_peaks(trace: Trace) -> tuple[CallPeak, ...]:
    """The calls without gradients in the last micro-batch of the last step that has any, in order."""
    calls = [(mark, a, b) for mark, a, b in _stretches(trace) if trace.mark_phase[mark] == _INFERENCE]
    if not calls:
        return ()
    place = [(int(trace.mark_step[mark]), int(trace.mark_micro_batch[mark])) for mark, _, _ in calls]
    return tuple(
        CallPeak(int(trace.allocated[max(a - 1, 0)]), int(trace.allocated[max(a - 1, 0) : b].max()))
        for here, (_, a, b) in zip(place, calls, strict=True)
        if here == place[-1]
    )


def leaves_the_steps(trace: Trace) -> bool:
    """Whether a run has phases that a training step does not have: inference, or work between its steps."""
    steps = {PHASES[int(trace.mark_phase[mark])] for mark, _, _ in _stretches(trace) if trace.mark_step[mark] >= 0}
    return bool(steps & {"inference", "outside"}) or _INFERENCE in trace.mark_phase


def about_phases(trace: Trace) -> Iterator[str]:
    """Sentences on a peak outside the phases of training, and on what inference keeps from one call to the next."""
    peaks = phase_peaks(trace)
    training = [one for one in peaks if one.phase not in _BESIDE_THE_STEPS]
    inside = max(training, key=lambda one: one.allocated_bytes, default=None)
    highest = trace.peak
    if inside and inside.allocated_bytes < highest.allocated_bytes:
        where = occasion(highest.step, highest.phase).replace(" · ", ", ")
        within = occasion(inside.step, inside.phase).replace(" · ", ", ")
        yield (
            f"the peak is outside the phases of training, in {where}; within them it is "
            f"{format_bytes(inside.allocated_bytes)} ({within})"
        )
    for one in peaks:
        if sum(one.kept.values()) > _LEAST_KEPT * one.allocated_bytes:
            listed = [f"{name or '(no module)'} {format_bytes(size)}" for name, size in one.kept.items()]
            more = ["…"] if len(listed) > _MOST_MODULES else []
            yield (
                f"inference keeps up to {format_bytes(sum(one.kept.values()))} from one call of a model to the next, "
                f"such as a KV cache: {', '.join([*listed[:_MOST_MODULES], *more])}"
            )
    calls = call_peaks(trace)
    if len(calls) >= _FEWEST_CALLS:
        keeps = any(one.kept for one in peaks)
        added = (calls[-1].held_bytes - calls[1].held_bytes) / (len(calls) - 2)  # the first takes in the prompt
        yield (
            f"the last {len(calls)} calls without gradients, such as one for each generated token, begin with "
            f"{format_bytes(calls[0].held_bytes)} to {format_bytes(calls[-1].held_bytes)}"
            + (
                f": after the first, each adds {format_bytes(round(added))} on average"
                if keeps and round(added)
                else ""
            )
        )


def _stretches(trace: Trace) -> Iterator[tuple[int, int, int]]:
    """Each mark with its first event and the one after its last, if it has any; one call of a model is one mark."""
    begins = trace.mark_event.tolist()
    begins[:1] = [0]  # `Trace.mark_at` counts events before the first mark to it
    for mark, (first, last) in enumerate(zip(begins, [*begins[1:], trace.events], strict=True)):
        if last > first:
            yield mark, first, last


def _most(before: PhasePeak | None, reserved: int | None) -> int | None:
    if before is None or before.reserved_bytes is None or reserved is None:
        return reserved
    return max(before.reserved_bytes, reserved)


def _kept(trace: Trace) -> dict[str, int]:
    """Bytes by module that calls without gradients keep for later ones, at the moment when they are most."""
    ends = np.append(trace.mark_event[1:], trace.events)
    made = (trace.phase == _INFERENCE) & ~np.isin(trace.category, _OF_NO_CALL)
    within = np.searchsorted(trace.mark_event, trace.born, side="right") - 1
    since = ends[np.maximum(within, 0)]
    until = np.where(trace.freed < 0, trace.events, trace.freed)
    rows = np.flatnonzero(made & (since < until))
    change = np.zeros(trace.events + 1, dtype=np.int64)
    np.add.at(change, since[rows], trace.size[rows])
    np.add.at(change, until[rows], -trace.size[rows])
    kept = change.cumsum()
    calls = [(a, b) for mark, a, b in _stretches(trace) if trace.mark_phase[mark] == _INFERENCE]
    event = max((a + int(np.argmax(kept[a:b])) for a, b in calls), key=lambda at: int(kept[at]), default=0)
    sizes: dict[str, int] = {}
    for row in rows[(since[rows] <= event) & (event < until[rows])].tolist():
        name = together(trace.modules[int(trace.module[row])])
        sizes[name] = sizes.get(name, 0) + int(trace.size[row])
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
