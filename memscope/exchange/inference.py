"""Inference of phases, steps and categories from stacks: a reconstruction, not a recording.

The rules are those of the recorder (`memscope.trace.CATEGORIES`), applied to phases that are themselves inferred:

- activation: allocated in the forward pass, and alive when the next backward pass begins or when the history ends in a
  forward pass;
- gradient: allocated in the backward pass, and alive when the optimizer or zero_grad begins, or at the end if neither
  does;
- optimizer_state: allocated in an optimizer's initialization; or in its step, and alive after the step or at the end of
  a history that ends in a step;
- temporary: freed in the step that allocated it; other: outlives its step for an unknown reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memscope.exchange.stacks import Place
from memscope.trace import CATEGORIES, MARK_COLUMNS, PHASES, Bools, Category, Ints, Phase

__all__ = ["Course", "categories_of", "course_of"]

_UNKNOWN = -1


def _codes(*phases: Phase) -> list[int]:
    return [PHASES.index(phase) for phase in phases]


_SETUP, _OUTSIDE, _FORWARD, _LOSS = _codes("setup", "outside", "forward", "loss")
_BACKWARD, _RECOMPUTE, _OPTIMIZER, _ZERO_GRAD = _codes("backward", "recompute", "optimizer", "zero_grad")
_FORWARD_LIKE, _BACKWARD_LIKE = (_FORWARD, _LOSS), (_BACKWARD, _RECOMPUTE)


@dataclass(frozen=True, eq=False)
class Course:
    """Phase, step and micro-batch of the run at each event, each int64 `[events]`."""

    phase: Ints
    step: Ints
    micro_batch: Ints

    def marks(self) -> dict[str, Any]:
        """Return the trace columns that mark the beginning of phases, steps and micro-batches, each int64 `[marks]`."""
        rows = np.stack([self.phase, self.step, self.micro_batch])
        changed = np.ones(rows.shape[1], dtype=bool)
        changed[1:] = (rows[:, 1:] != rows[:, :-1]).any(axis=0)
        events = np.flatnonzero(changed)
        return dict(zip(MARK_COLUMNS, [events, *rows[:, events]], strict=True))


def course_of(told: Ints, born: Bools, without_stack: Bools, first: int, ended: Bools) -> Course:
    """Infer the phases that stacks leave open, and count the steps.

    Args:
        told: the phase that each event's stack shows; -1: none `[events]`.
        born: whether each event is an allocation `[events]`.
        without_stack: whether each event lacks a stack, in a history that records stacks `[events]`.
        first: number of events before the history began.
        ended: whether an annotation ends an optimizer step right before each event `[events]`.
    """
    phase = told.copy()
    # CUDA's backward pass runs in a thread of autograd's engine, whose stacks have no Python frames.
    goes_back = np.isin(_last_known(phase), [*_FORWARD_LIKE, *_BACKWARD_LIKE])
    phase[born & without_stack & goes_back & (phase == _UNKNOWN)] = _BACKWARD
    last = _last_known(phase)
    open_births = born & (phase == _UNKNOWN)
    phase[open_births & np.isin(last, _FORWARD_LIKE)] = _LOSS
    phase[open_births & ~np.isin(last, _FORWARD_LIKE) & (last != _UNKNOWN)] = _OUTSIDE
    phase = np.where(phase == _UNKNOWN, _last_known(phase), phase)
    phase[phase == _UNKNOWN] = _SETUP
    phase[:first] = _SETUP
    return _counted(phase, ended)


def _last_known(phase: Ints) -> Ints:
    """The last known phase at each event; -1 before the first."""
    index = np.maximum.accumulate(np.where(phase != _UNKNOWN, np.arange(len(phase)), -1))
    return np.where(index >= 0, phase[np.maximum(index, 0)], _UNKNOWN)


def _counted(phase: Ints, ended: Bools) -> Course:
    """Count steps: a step ends with the optimizer or, if no event shows it, with zero_grad after a backward pass."""
    changes = np.flatnonzero((np.diff(phase, prepend=-1) != 0) | ended).tolist()
    step, micro_batch, saw_backward, is_over = -1, 0, False, True
    steps, micro_batches = np.full(len(phase), -1), np.zeros(len(phase), dtype=np.int64)
    for begin, end in zip(changes, [*changes[1:], len(phase)], strict=True):
        now = int(phase[begin])
        is_over = is_over or (bool(ended[begin]) and step >= 0)
        if now in _FORWARD_LIKE and is_over:
            step, micro_batch, saw_backward, is_over = step + 1, 0, False, False
        elif now in _FORWARD_LIKE and saw_backward:
            micro_batch, saw_backward = micro_batch + 1, False
        elif now in (*_BACKWARD_LIKE, _OPTIMIZER) and step < 0:
            step, is_over = 0, False  # the history begins within a step
        saw_backward = saw_backward or now in _BACKWARD_LIKE
        is_over = is_over or now == _OPTIMIZER or (now == _ZERO_GRAD and saw_backward)
        steps[begin:end], micro_batches[begin:end] = step, micro_batch
    phase = np.where((phase == _SETUP) & (steps >= 0), _OUTSIDE, phase)
    return Course(phase, steps, micro_batches)


def categories_of(
    course: Course, born: Ints, freed: Ints, places: Sequence[Place], place: Ints, *, cut_short: bool = False
) -> Ints:
    """Infer the category of each allocation `[allocations]`.

    Args:
        course: phase, step and micro-batch of each event.
        born: event that made each allocation `[allocations]`.
        freed: event that freed each allocation; -1: never `[allocations]`.
        places: the information in the stacks.
        place: the index in `places` for each allocation's stack `[allocations]`.
        cut_short: whether the run ended out of memory, so that allocations alive at the end might have been temporary.
    """
    events = len(course.phase)
    end = np.where(freed < 0, events, freed)
    phase, is_kept = course.phase[born], freed < 0
    backward = _next(course.phase == _BACKWARD)[born]
    update = _next(np.isin(course.phase, [_OPTIMIZER, _ZERO_GRAD]))[born]
    after_optimizer = _next(course.phase != _OPTIMIZER)[born]
    ends_forward = bool(events) and int(course.phase[-1]) in _FORWARD_LIKE
    in_forward, in_backward = np.isin(phase, [*_FORWARD_LIKE, _RECOMPUTE]), phase == _BACKWARD

    dies_in_step = ~is_kept & (course.step[np.minimum(end, events - 1)] == course.step[born])
    category = np.where(dies_in_step & bool(place.any()), _category("temporary"), _category("other"))
    category[in_forward & (backward < events) & (end >= backward)] = _category("activation")
    category[in_forward & (backward == events) & is_kept & ends_forward] = _category("activation")
    category[in_backward & (update < events) & (end >= update)] = _category("gradient")
    category[in_backward & (update == events) & is_kept] = _category("gradient")
    outlives = (after_optimizer < events) & (end > after_optimizer)
    category[(phase == _OPTIMIZER) & (outlives | (is_kept & (not cut_short)))] = _category("optimizer_state")
    told = np.array([_UNKNOWN if p.category is None else _category(p.category) for p in places])[place]
    return np.where(told == _UNKNOWN, category, told)


def _next(which: Bools) -> Ints:
    """For each event, the first one at or after it for which `which` is true; the number of events if there is none."""
    events = len(which)
    found: Ints = np.minimum.accumulate(np.where(which, np.arange(events), events)[::-1])[::-1]
    return found


def _category(name: Category) -> int:
    return CATEGORIES.index(name)
