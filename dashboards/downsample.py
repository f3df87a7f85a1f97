"""Down-sampling: the events of a trace that a figure shows, chosen so that the curve looks the same."""

from __future__ import annotations

import numpy as np

from memscope.trace import Ints

__all__ = ["MOST_POSITIONS", "shown_events"]

MOST_POSITIONS = 4000
"""Default number of events shown: about two for each pixel column of a wide screen."""


def shown_events(allocated: Ints, marked: Ints, most: int = MOST_POSITIONS) -> Ints:
    """The events of a curve to show, in order: int64 `[shown]`, at most `most` of them.

    A short run keeps all its events. A long run is cut into equal stretches, each of which keeps the events with its
    largest and its smallest value. So the result contains the first event of the largest value overall, and every local
    maximum that is the largest of its stretch. The first and the last event are kept too.

    Args:
        allocated: the curve, one value after each event: int64 `[events]`.
        marked: further events to keep, such as the first of each phase: int64 `[marked]`. If they need more than half
            of the positions, they are thinned evenly.
        most: largest number of events to show, at least 8.

    Raises:
        ValueError: when `most` is below 8.
    """
    if most < 8:
        raise ValueError(f"{most} positions cannot hold a curve: at least 8 are needed")
    events = allocated.size
    if events <= most:
        return np.arange(events, dtype=np.int64)
    marked = np.unique(marked)
    if marked.size > most // 2 - 2:
        marked = marked[np.linspace(0, marked.size - 1, most // 2 - 2).astype(np.int64)]
    kept = np.union1d(marked, [0, events - 1])
    stretches = (most - kept.size) // 2
    width = -(-events // stretches)
    return np.union1d(kept, np.concatenate([_extremes(allocated, width, largest) for largest in (True, False)]))


def _extremes(values: Ints, width: int, largest: bool) -> Ints:
    """Index of the first largest (or smallest) value in each stretch of `width` values."""
    stretches = -(-values.size // width)
    # A value no allocation can have, so that padding is never chosen.
    padding = np.iinfo(np.int64).min if largest else np.iinfo(np.int64).max
    rows = np.full(stretches * width, padding, dtype=np.int64)
    rows[: values.size] = values
    table = rows.reshape(stretches, width)
    column: Ints = table.argmax(axis=1) if largest else table.argmin(axis=1)
    return np.arange(stretches, dtype=np.int64) * width + column


if __name__ == "__main__":
    walk = np.cumsum(np.random.default_rng(0).integers(-100, 101, 1_000_000))
    shown = shown_events(walk, np.array([], dtype=np.int64))
    print(f"{walk.size:,} events, {shown.size:,} shown; largest {walk.max():,}, largest shown {walk[shown].max():,}")
