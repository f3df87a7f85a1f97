"""How a fine-tuning run goes: its length, its learning rates, what is measured and what is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """The settings of a run beside model and data; schedule, warm-up and clipping by default as in Stanford Alpaca.

    Alpaca's README gives cosine and a warm-up ratio of 0.03; clipping at 1.0 is the default of the trainer it uses,
    transformers'. That begins its warm-up with a step at rate 0; none is wasted so here.

    Raises:
        ValueError: listing everything that is wrong with the values.
    """

    epochs: float = 1.0
    """How often every sample is seen."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to 0: linear or cosine."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises to its full value."""
    clip_grad_norm: float | None = 1.0
    """Largest total norm of the gradients; none: no clipping."""
    held_out: int = 16
    """Rows after the samples that are not trained on; their perplexity is measured before and after."""
    save_every: int = 100
    """Steps from one checkpoint to the next."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    format: Literal["huggingface", "meta"] = "huggingface"
    """Of the weights that are saved at the end: huggingface or meta; LoRA updates are saved as PEFT does."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))

    def steps(self, samples: int, batch: int) -> int:
        """Optimizer steps in which `samples` samples are seen `epochs` times, `batch` in each; the last one is full."""
        return math.ceil(self.epochs * samples / batch)

    def rate_factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by in a step, counted from 0: rises to 1, never 0 in a step."""
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
        yield f"held_out={recipe.held_out}: expected 0 or more rows"
    for name in ("save_every", "keep"):
        if getattr(recipe, name) < 1:
            yield f"{name}={getattr(recipe, name)}: expected a whole number from 1"
