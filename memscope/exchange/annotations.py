"""Phases and ends of optimizer steps in a history, from `torch.profiler.record_function` ranges.

PyTorch's optimizers record such ranges themselves (`profile_hook_step` and `zero_grad` in torch/optim/optimizer.py). A
snapshot holds ranges if it was recorded with `global_record_annotations=True`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memscope.exchange.layout import Annotation
from memscope.trace import PHASES, Bools, Ints, Phase

__all__ = ["annotated"]

_WORDS: tuple[tuple[str, Phase], ...] = (
    ("zero_grad", "zero_grad"),
    ("optimizer", "optimizer"),
    ("backward", "backward"),
    ("forward", "forward"),
)
"""Word in the name of a range → phase. Case is ignored; the first word that matches decides."""
_NEVER = 2**62


def annotated(annotations: Sequence[Annotation], times_us: Ints) -> tuple[Ints, Bools]:
    """Return each event's phase according to annotations (-1: none), and whether an optimizer step ends before it.

    Args:
        annotations: the annotations of one device, in order.
        times_us: time of each event in microseconds `[events]`.
    """
    events = len(times_us)
    phase, ended = np.full(events, -1), np.zeros(events, dtype=bool)
    clock = np.maximum.accumulate(times_us)  # a thread takes the time before it waits for the allocator's lock
    for name, begin, end in _blocks(annotations):
        stands_for = next((phase for word, phase in _WORDS if word in name.lower()), None)
        if stands_for is None:
            continue
        first, last = np.searchsorted(clock, [begin, end])
        phase[first:last] = PHASES.index(stands_for)
        if stands_for == "optimizer" and last < events:
            ended[last] = True
    return phase, ended


def _blocks(annotations: Sequence[Annotation]) -> list[tuple[str, int, int]]:
    """Name, begin and end of each range, ordered by begin: outer ranges precede inner ones."""
    found: list[tuple[str, int, int]] = []
    begun: dict[str, list[int]] = {}
    for annotation in annotations:
        waiting = begun.setdefault(annotation.name, [])
        if annotation.begins:
            waiting.append(len(found))
            found.append((annotation.name, annotation.time_us, _NEVER))
        elif waiting:
            index = waiting.pop()
            found[index] = annotation.name, found[index][1], annotation.time_us
    return sorted(found, key=lambda block: block[1])
