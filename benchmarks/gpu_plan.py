"""The cells that `make gpu` measures, their order, and the time budget.

Needs neither torch nor a GPU.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STEP = ((98, 45), (55, 42), (117, 43), (136, 43), (208, 48), (71, 67), (118, 69), (405, 68))
"""Tokens and prompt tokens of the first step's samples: Stanford Alpaca's first 200 rows with LLaMA2's tokenizer.

The longest of the 200 comes last, as in the target's own steps.
"""

AXES: dict[str, tuple[Any, ...]] = {
    "weights": ("fp32", "bf16"),
    "amp": ("none", "fp16", "bf16"),
    "training": ("full", "lora"),
    "ckpt": ("none", "all"),
    "accumulation": (8, 1),
    "attention": ("eager", "sdpa"),
}


@dataclass(frozen=True)
class TrainingCell:
    """One way to train. A step's 8 samples run in `accumulation` micro-batches."""

    weights: str
    amp: str
    training: str
    ckpt: str
    accumulation: int
    attention: str

    @property
    def name(self) -> str:
        """Name of the cell, usable in file names."""
        amp = "noamp" if self.amp == "none" else f"amp{self.amp}"
        ckpt = "nockpt" if self.ckpt == "none" else "ckpt"
        return f"{self.weights}-{amp}-{self.training}-{ckpt}-ga{self.accumulation}-{self.attention}"

    @property
    def plan(self) -> str:
        """The cell's strategies. Weights and attention are settings of the target."""
        words = ["lora"] * (self.training == "lora") + [f"amp:dtype={self.amp}"] * (self.amp != "none")
        return ",".join([*words, *["ckpt"] * (self.ckpt == "all"), f"ga:steps={self.accumulation}"])

    @property
    def possible(self) -> bool:
        """Whether PyTorch can run the cell: a gradient scaler cannot unscale bfloat16 gradients on CUDA.

        Source: `_amp_foreach_non_finite_check_and_unscale_cuda_` in aten/src/ATen/native/cuda/AmpKernels.cu is not
        implemented for bfloat16; pytorch/pytorch issue 127176, open in August 2026.
        """
        return not (self.weights == "bf16" and self.amp == "fp16")


FIRST = (
    TrainingCell("fp32", "none", "full", "none", 8, "eager"),  # the largest: nearly all of an H200
    TrainingCell(
        "fp32", "fp16", "lora", "none", 8, "eager"
    ),  # as published for an A100, except for wk's update and the biases
    TrainingCell("bf16", "none", "lora", "none", 8, "sdpa"),
    TrainingCell("bf16", "bf16", "full", "all", 1, "sdpa"),
)


TIMED = tuple(
    (cell, by)
    for cell, recorders in (
        (FIRST[2], ("nothing", "memscope", "_record_memory_history", "nothing")),
        # MemTracker does not support frozen weights: it requires a gradient of each weight.
        (
            TrainingCell("bf16", "none", "full", "none", 8, "sdpa"),
            ("nothing", "memscope", "_record_memory_history", "MemTracker"),
        ),
    )
    for by in recorders
)
"""Cells whose steps are timed, each with the recorder."""


def covering(count: int, first: Sequence[TrainingCell] = FIRST) -> list[TrainingCell]:
    """Return `count` cells, or all. Each next cell adds the most new pairs of values, then the most new triples."""
    left = [cell for values in itertools.product(*AXES.values()) if (cell := TrainingCell(*values)).possible]
    chosen: list[TrainingCell] = []
    seen: set[tuple[tuple[str, Any], ...]] = set()

    def gain(cell: TrainingCell) -> tuple[int, int]:
        new = [tuple_ for tuple_ in combinations(cell) if tuple_ not in seen]
        return sum(len(tuple_) == 2 for tuple_ in new), len(new)

    for wanted in itertools.chain(first, itertools.repeat(None)):
        if len(chosen) == count or not left:
            return chosen
        cell = wanted or max(left, key=gain)
        left.remove(cell)
        chosen.append(cell)
        seen.update(combinations(cell))
    raise AssertionError("unreachable: the loop is infinite")


def combinations(cell: TrainingCell) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Return each pair and each triple of a cell's values."""
    values = list(asdict(cell).items())
    return itertools.chain(itertools.combinations(values, 2), itertools.combinations(values, 3))


class Budget:
    """A time limit, and whether the remaining time suffices for another task."""

    def __init__(self, limit_seconds: float, *, reserve_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._reserve_seconds = clock, reserve_seconds
        self._began = clock()
        self._limit_seconds = limit_seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    @property
    def left(self) -> float:
        """Seconds left before the time reserved for the end; at least 0."""
        return max(0.0, self._limit_seconds - self._reserve_seconds - self.spent)

    def allows(self, taken: Sequence[float], guess: float) -> bool:
        """Whether another task fits: one a quarter longer than the slowest in `taken` or, without any, of `guess`."""
        return self.left >= (1.25 * max(taken) if taken else guess)
