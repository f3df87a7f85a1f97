"""Settings that choose the next token, and the result."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from memscope.errors import UsageError

__all__ = ["Continuation", "Decoding", "Limit", "TextSearch"]


@dataclass(frozen=True)
class Decoding:
    """Settings that choose the next token. The default is greedy decoding: always the most probable token.

    Raises:
        UsageError: a value is invalid or contradicts another; the message lists every problem.
    """

    max_new_tokens: int = 128
    """Maximum number of tokens to add to a prompt; generation ends earlier at EOS or when the context is full."""
    temperature: float = 0.0
    """Divide logits by this value and sample the next token; 0: no sampling, take the most probable token."""
    top_k: int | None = None
    """Sample only from this many of the most probable tokens."""
    top_p: float | None = None
    """Sample only from the fewest most probable tokens whose probabilities add up to this share."""
    beams: int = 1
    """Number of sequences that beam search follows for each prompt; 1: no beam search."""
    length_penalty: float = 1.0
    """Beam search compares log-probability / length ** length_penalty; larger values favor longer texts."""
    cache: bool = True
    """Keep keys and values of earlier tokens (a KV cache), so that each token passes through the model once."""
    seed: int = 0
    """Seed for sampling the first prompt; each further prompt uses the next seed."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise UsageError("invalid generation settings:\n" + "\n".join(f"  {problem}" for problem in problems))


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
        yield f"beams={decoding.beams} with {drawing}: beam search does not sample: leave out one or the other"
    elif filters and decoding.temperature == 0:
        yield f"{', '.join(filters)} with temperature=0: nothing is sampled: set temperature=1, or leave it out"
    if decoding.length_penalty != 1 and decoding.beams == 1:
        yield f"length_penalty={decoding.length_penalty} with beams=1: only beam search uses it: set beams to 2 or more"


@dataclass(frozen=True)
class Limit:
    """Maximum length of a continuation."""

    tokens: int
    reason: Literal["length", "context"]
    """What sets the limit: `max_new_tokens` or the context of the model."""


@dataclass(frozen=True)
class Continuation:
    """The text added to a prompt."""

    tokens: tuple[int, ...]
    """Token ids, without the prompt and without EOS."""
    ended_by: Literal["eos", "length", "context"]
    """The reason it ended: the model gave EOS, `max_new_tokens` was reached, or the context is full."""

    @classmethod
    def of(cls, tokens: Sequence[int], eos_id: int | None, limit: Limit) -> Continuation:
        """Build a continuation from new tokens; the last may be EOS."""
        if tokens[-1] == eos_id:
            return cls(tuple(tokens[:-1]), "eos")
        return cls(tuple(tokens), limit.reason)


TextSearch = Generator[list[list[int]], Tensor, Continuation]
"""A search for the continuation of one prompt, as a generator.

It yields the sequences (prompt included) whose next token it needs, best first; receives their logits
`[sequences, vocab_size]`, which it must not keep; and returns the continuation."""
