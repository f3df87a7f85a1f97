"""Settings of a training run: its length, learning rates, held-out samples and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """The settings of a run besides model and data. Schedule, warm-up and clipping default to Stanford Alpaca's.

    Alpaca's README gives cosine and a warm-up ratio of 0.03; clipping at 1.0 is the default of transformers' trainer,
    which Alpaca uses. That trainer begins the warm-up with a step at rate 0; this one does not waste a step.

    Raises:
        ValueError: a value is invalid; the message lists every problem.
    """

    epochs: float = 1.0
    """Number of passes over the samples."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to 0 as linear or cosine."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises to its full value."""
    clip_grad_norm: float | None = 1.0
    """Maximum total norm of the gradients; none: no clipping."""
    held_out: int = 16
    """Number of samples after those trained on to hold out; their perplexity is measured before and after training."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))

    def steps(self, samples: int, batch: int) -> int:
        """Optimizer steps for `epochs` passes over `samples` samples, `batch` per step; the last step is full."""
        return math.ceil(self.epochs * samples / batch)

    def rate_factor(self, step: int, steps: int) -> float:
        """Factor on the learning rate in a step, counted from 0. Rises to 1 in the warm-up; never 0."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        if self.schedule == "constant":
            return 1.0
        done = (step - rising) / (steps - rising)
        return 1.0 - done if self.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2


def _problems(recipe: Recipe) -> Iterator[str]:
    if not 0 < recipe.epochs < math.inf:
        yield f"epochs={recipe.epochs}: expected a number above 0"
    if not 0 <= recipe.warmup <= 1:
        yield f"warmup={recipe.warmup}: expected a share of the steps, 0 to 1"
    if recipe.clip_grad_norm is not None and not recipe.clip_grad_norm > 0:
        yield f"clip_grad_norm={recipe.clip_grad_norm}: expected a number above 0, or none"
    if recipe.held_out < 0:
        yield f"held_out={recipe.held_out}: expected 0 or more samples"
    for name in ("save_every", "keep"):
        if getattr(recipe, name) < 1:
            yield f"{name}={getattr(recipe, name)}: expected a whole number from 1"
