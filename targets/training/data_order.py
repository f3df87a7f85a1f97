"""The samples of each step: a pure function of seed and step, so that a resumed run continues in the same order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

__all__ = ["samples_of_step"]

T = TypeVar("T")


def samples_of_step(samples: Sequence[T], step: int, size: int, seed: int) -> list[T]:
    """The `size` samples of a step; steps are counted from 0.

    Every epoch visits all samples in an order of its own. A step may span two epochs, so all steps are full and no
    sample is left out.
    """
    places = range(step * size, (step + 1) * size)
    return [samples[_order(len(samples), seed, place // len(samples))[place % len(samples)]] for place in places]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Python keeps the sequence of a text-seeded generator across versions; PyTorch does not promise that.
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(count), count))
