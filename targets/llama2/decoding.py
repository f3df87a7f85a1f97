"""How the next token is chosen, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from memscope.errors import UsageError

__all__ = ["Continuation", "Decoding", "Limit", "Search"]


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen. The defaults are greedy: always the most probable one.

    Raises:
        UsageError: listing everything that is wrong with the values, at once.
    """

    max_new_tokens: int = 128
    """Most tokens to add to a prompt; it ends earlier at EOS, or where the context is full."""
    temperature: float = 0.0
    """Logits are divided by it and the next token is drawn; 0: nothing is drawn, the most probable token is taken."""
    top_k: int | None = None
    """Draw from this many of the most probable tokens only."""
    top_p: float | None = None
    """Draw only from the most probable tokens, as few as have this much of the probability together."""
    beams: int = 1
    """Sequences that beam search follows for each prompt; 1: no beam search."""
    length_penalty: float = 1.0
    """Beam search compares log-probability / length ** length_penalty: the larger, the longer the texts."""
    seed: int = 0
    """The first prompt draws with this seed, the next with one more, and so on."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise UsageError("nothing can be generated:\n" + "\n".join(f"  {problem}" for problem in problems))


def _problems(decoding: Decoding) -> Iterator[str]:
    for name in ("max_new_tokens", "beams", "top_k"):
        value = getattr(decoding, name)
        if value is not None and value < 1:
            yield f"{name}={value}: expected a whole number from 1"
    if not 0 <= decoding.temperature < math.inf:
        yield f"temperature={decoding.temperature}: expected a number from 0"
    if decoding.top_p is not None and not 0 < decoding.top_p <= 1:
        yield f"top_p={decoding.top_p}: expected a share of the probability, above 0 and up to 1"
    if not -10 <= decoding.length_penalty <= 10:
        yield f"length_penalty={decoding.length_penalty}: expected a number from -10 to 10"
    if not 0 <= decoding.seed < 2**63:
        yield f"seed={decoding.seed}: expected a whole number from 0 and below 2**63"
    yield from _contradictions(decoding)


def _contradictions(decoding: Decoding) -> Iterator[str]:
    filters = [
        f"{name}={getattr(decoding, name)}" for name in ("top_k", "top_p") if getattr(decoding, name) is not None
    ]
    if decoding.beams > 1 and (decoding.temperature > 0 or filters):
        drawing = ", ".join([f"temperature={decoding.temperature}"] * (decoding.temperature > 0) + filters)
        yield f"beams={decoding.beams} with {drawing}: beam search draws nothing: leave out the one or the other"
    elif filters and decoding.temperature == 0:
        yield f"{', '.join(filters)} with temperature=0: nothing is drawn: set temperature=1, or leave it out"
    if decoding.length_penalty != 1 and decoding.beams == 1:
        yield f"length_penalty={decoding.length_penalty} with beams=1: only beam search compares lengths: set beams"


@dataclass(frozen=True)
class Limit:
    """Where a continuation has to end at the latest."""

    tokens: int
    reason: Literal["length", "context"]
    """What sets it: `max_new_tokens`, or the context of the model."""


@dataclass(frozen=True)
class Continuation:
    """What was added to a prompt."""

    tokens: tuple[int, ...]
    """Token ids, without the prompt and without EOS."""
    ended_by: Literal["eos", "length", "context"]
    """The model itself, `max_new_tokens`, or the context, which is full."""

    @classmethod
    def of(cls, tokens: Sequence[int], eos_id: int | None, limit: Limit) -> Continuation:
        """From new tokens, of which the last one may be EOS."""
        if tokens[-1] == eos_id:
            return cls(tuple(tokens[:-1]), "eos")
        return cls(tuple(tokens), limit.reason)


Search = Generator[list[list[int]], Tensor, Continuation]
"""The continuation of one prompt. Yields the sequences (prompt included) whose next token it wants to know, the best
one first; is sent their logits `[sequences, vocab_size]`, which it must not keep; returns the result."""
