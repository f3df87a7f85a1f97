"""What `torch.profiler.record_function` blocks tell of a history: phases, and where an optimizer step ends.

PyTorch's optimizers have such blocks of their own (`profile_hook_step` and `zero_grad` in torch/optim/optimizer.py); a
snapshot holds them when it was recorded with `global_record_annotations=True`.
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
"""The phase of a block whose name holds such a word, whatever the case; the first that it holds."""
_NEVER = 2**62


def annotated(annotations: Sequence[Annotation], times_us: Ints) -> tuple[Ints, Bools]:
    """The phase that annotations give each event, -1 for none, and before which events an optimizer step ended.

    Args:
        annotations: of one device, in order.
        times_us: when each event was `[events]`.
    """
    events = len(times_us)
    phase, ended = np.full(events, -1), np.zeros(events, dtype=bool)
    clock = np.maximum.accumulate(times_us)  # threads note their times before they wait for their turn
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
    """Name, beginning and end of each block, in order of beginning: inner ones after those around them."""
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
