"""What `make gpu` measures, in which order, and how measured and predicted allocations are told apart.

Needs neither torch nor a GPU.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from memscope.simulation.allocator import Ints, Replay
from memscope.simulation.allocator_history import History
from memscope.trace import CATEGORIES, PHASES, Trace
from memscope.units import format_bytes, format_change

AXES: dict[str, tuple[Any, ...]] = {
    "weights": ("fp32", "bf16"),
    "amp": ("none", "fp16", "bf16"),
    "training": ("full", "lora"),
    "ckpt": ("none", "all"),
    "accumulation": (8, 1),
    "attention": ("eager", "sdpa"),
}


@dataclass(frozen=True)
class Cell:
    """One way to train; a step's 8 samples go through the model in `accumulation` micro-batches."""

    weights: str
    amp: str
    training: str
    ckpt: str
    accumulation: int
    attention: str

    @property
    def name(self) -> str:
        """The cell as part of a file's name."""
        amp = "noamp" if self.amp == "none" else f"amp{self.amp}"
        ckpt = "nockpt" if self.ckpt == "none" else "ckpt"
        return f"{self.weights}-{amp}-{self.training}-{ckpt}-ga{self.accumulation}-{self.attention}"

    @property
    def plan(self) -> str:
        """The cell's strategies; weights and attention are settings of the target."""
        words = ["lora"] * (self.training == "lora") + [f"amp:dtype={self.amp}"] * (self.amp != "none")
        return ",".join([*words, *["ckpt"] * (self.ckpt == "all"), f"ga:steps={self.accumulation}"])

    @property
    def possible(self) -> bool:
        """Whether PyTorch can run it: a gradient scaler cannot unscale bfloat16 gradients on CUDA.

        Source: `_amp_foreach_non_finite_check_and_unscale_cuda_` in aten/src/ATen/native/cuda/AmpKernels.cu is not
        implemented for bfloat16; pytorch/pytorch issue 127176, open in August 2026.
        """
        return not (self.weights == "bf16" and self.amp == "fp16")


FIRST = (
    Cell("fp32", "none", "full", "none", 8, "eager"),  # the largest: nearly all of an H200
    Cell("fp32", "fp16", "lora", "none", 8, "eager"),  # as published for an A100, but for wk's update and the biases
    Cell("bf16", "none", "lora", "none", 8, "sdpa"),
    Cell("bf16", "bf16", "full", "all", 1, "sdpa"),
)


def covering(count: int, first: Sequence[Cell] = FIRST) -> list[Cell]:
    """`count` cells, or all: each next one brings most pairs of values not seen together yet, then most triples."""
    left = [cell for cell in map(Cell._make, itertools.product(*AXES.values())) if cell.possible] if False else []
    left = [cell for values in itertools.product(*AXES.values()) if (cell := Cell(*values)).possible]
    chosen: list[Cell] = []
    seen: set[tuple[tuple[str, Any], ...]] = set()

    def gain(cell: Cell) -> tuple[int, int]:
        new = [tuple_ for tuple_ in combinations(cell) if tuple_ not in seen]
        return sum(len(tuple_) == 2 for tuple_ in new), len(new)

    for wanted in itertools.chain(first, itertools.repeat(None)):
        if len(chosen) == count or not left:
            return chosen
        cell = wanted or max(left, key=gain)
        left.remove(cell)
        chosen.append(cell)
        seen.update(combinations(cell))
    raise AssertionError("unreachable: the loop has no end of its own")


def combinations(cell: Cell) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Each pair and each triple of a cell's values."""
    values = list(asdict(cell).items())
    return itertools.chain(itertools.combinations(values, 2), itertools.combinations(values, 3))


class Budget:
    """The time there is, and whether it is enough for one thing more."""

    def __init__(self, limit_seconds: float, *, reserve_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._reserve_seconds = clock, reserve_seconds
        self._began = clock()
        self._limit_seconds = limit_seconds

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def left(self) -> float:
        """Seconds until only what is reserved for the end is left; never below 0."""
        return max(0.0, self._limit_seconds - self._reserve_seconds - self.spent)

    def allows(self, taken: Sequence[float], guess: float) -> bool:
        """Whether one thing more fits, if it takes a quarter longer than the slowest so far, or else `guess`."""
        return self.left >= (1.25 * max(taken) if taken else guess)


@dataclass(frozen=True)
class Aligned:
    """Two sequences of sizes laid side by side."""

    partner: Ints
    """For each allocation of the first, the same one in the second, or -1 `[allocations of the first]`."""
    places: tuple[tuple[slice, slice], ...]
    """Where they differ, in order: what only the first has, what only the second has."""


def align(ours: Ints, theirs: Ints, *, window: int = 200, confirm: int = 8) -> Aligned:
    """Go through both side by side; where they differ, go on behind the shortest stretch left out on either side.

    A stretch is left out when the next `confirm` sizes agree again (or all to the end), at most `window` on both sides
    together. Without one, the rest is one difference.
    """
    partner = np.full(len(ours), -1, dtype=np.int64)
    places = []
    i = j = 0
    while True:
        length = min(len(ours) - i, len(theirs) - j)
        unequal = np.flatnonzero(ours[i : i + length] != theirs[j : j + length])
        same = int(unequal[0]) if unequal.size else length
        partner[i : i + same] = np.arange(j, j + same)
        i, j = i + same, j + same
        if i == len(ours) and j == len(theirs):
            return Aligned(partner, tuple(places))
        skip_ours, skip_theirs = _resume(ours[i:], theirs[j:], window, confirm)
        places.append((slice(i, i + skip_ours), slice(j, j + skip_theirs)))
        i, j = i + skip_ours, j + skip_theirs


def _resume(ours: Ints, theirs: Ints, window: int, confirm: int) -> tuple[int, int]:
    """How much to leave out of both so that they agree again."""
    one, other = ours[: window + confirm].tolist(), theirs[: window + confirm].tolist()
    for skipped in range(1, window + 1):
        for a in range(max(0, skipped - len(other) + 1), min(skipped, len(one) - 1) + 1):
            b = skipped - a
            if one[a] == other[b] and one[a : a + confirm] == other[b : b + confirm]:
                return a, b
    return len(ours), len(theirs)


def compare(history: History, replayed: Replay, trace: Trace) -> dict[str, Any]:
    """A GPU's allocations against the simulated ones, as JSON values; `replayed` is the replay of `history`."""
    aligned = align(history.sizes, trace.requested)
    at = int(replayed.allocated.argmax())
    alive = (history.born <= at) & ((history.freed < 0) | (history.freed > at))
    partner = aligned.partner[alive]
    blocks = replayed.block_sizes[alive]
    known = np.where(partner >= 0, trace.category[partner], len(CATEGORIES))
    sizes = np.bincount(known, weights=blocks, minlength=len(CATEGORIES) + 1)
    identical = not aligned.places
    return {
        "allocations": {"measured": len(history.sizes), "predicted": len(trace)},
        "identical": identical,
        "identical_with_frees": identical and bool(np.array_equal(history.freed, trace.freed)),
        "first_difference": None if identical else _first(history, trace, aligned),
        "first_free": _first_free(history, trace) if identical else None,
        "places": len(aligned.places),
        "only_measured": sum(place.stop - place.start for place, _ in aligned.places),
        "only_predicted": sum(place.stop - place.start for _, place in aligned.places),
        "differences": _grouped(history, trace, aligned),
        "measured_by_category": {
            name: int(size) for name, size in zip((*CATEGORIES, "unmatched"), sizes, strict=True) if size
        },
    }


def _first(history: History, trace: Trace, aligned: Aligned) -> dict[str, Any]:
    place, other = aligned.places[0]
    here = _located(trace, min(other.start, len(trace) - 1))
    sides = {"measured": history.sizes[place.start :], "predicted": trace.requested[other.start :]}
    return {"index": place.start, **{name: sizes[:6].tolist() for name, sizes in sides.items()}, **here}


def _first_free(history: History, trace: Trace) -> dict[str, Any] | None:
    """The first allocation, by birth, that is freed at another event."""
    unequal = np.flatnonzero(history.freed != trace.freed)
    if not unequal.size:
        return None
    index = int(unequal[0])
    events = {"measured": int(history.freed[index]), "predicted": int(trace.freed[index])}
    return {"index": index, "size": int(trace.requested[index]), **events, **_located(trace, index)}


def _located(trace: Trace, index: int) -> dict[str, Any]:
    return {
        "op": trace.ops[int(trace.op[index])],
        "module": trace.modules[int(trace.module[index])],
        "phase": PHASES[int(trace.phase[index])],
        "step": int(trace.step[index]),
        "micro_batch": int(trace.micro_batch[index]),
    }


def _grouped(history: History, trace: Trace, aligned: Aligned, most: int = 20) -> list[dict[str, Any]]:
    """The differences by what they are, most frequent first: sizes on both sides, and the operator simulated there."""
    counts: Counter[tuple[Any, ...]] = Counter()
    first: dict[tuple[Any, ...], int] = {}
    for place, other in aligned.places:
        here = _located(trace, min(other.start, len(trace) - 1))
        sizes = tuple(history.sizes[place][:8].tolist()), tuple(trace.requested[other][:8].tolist())
        key = (*sizes, here["op"], here["phase"])
        counts[key] += 1
        first.setdefault(key, place.start)
    names = ("only_measured", "only_predicted", "op", "phase")
    return [
        {"count": n, "first": first[key], **dict(zip(names, key, strict=True))} for key, n in counts.most_common(most)
    ]


def off(measured: int, predicted: int) -> float:
    """How far a prediction is from what was measured, as a fraction of it."""
    return (predicted - measured) / measured


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Worst and median error, and how many sequences and replays are identical."""
    done = [row for row in rows if row["status"] == "measured" and "predicted" in row]
    errors = {
        name: sorted(abs(off(row["measured"][name], row["predicted"][name])) for row in done)
        for name in ("allocated", "reserved", "requested")
    }
    return {
        "cells": len(rows),
        "measured": sum(row["status"] == "measured" for row in rows),
        "compared": len(done),
        "identical": sum(bool(row.get("comparison", {}).get("identical")) for row in done),
        "replayed": sum(row.get("replay", {}).get("exact", False) for row in rows),
        **{f"{name}_worst": values[-1] for name, values in errors.items() if values},
        **{f"{name}_median": median(values) for name, values in errors.items() if values},
    }
