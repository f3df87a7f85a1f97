"""Greedy decoding and sampling: one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memscope.targets.llama2.decoding import Continuation, Decoding, Limit, TextSearch

__all__ = ["one_by_one", "probabilities"]


def one_by_one(
    prompt: Sequence[int], limit: Limit, decoding: Decoding, eos_id: int | None, drawing: torch.Generator
) -> TextSearch:
    """Continue a prompt greedily or, with a temperature, by sampling; see `decoding.TextSearch`."""
    new: list[int] = []
    while True:
        new.append(_choose((yield [[*prompt, *new]])[0], decoding, drawing))
        if new[-1] == eos_id or len(new) == limit.tokens:
            return Continuation.of(new, eos_id, limit)


def _choose(logits: Tensor, decoding: Decoding, drawing: torch.Generator) -> int:
    if decoding.temperature == 0:
        return int(logits.argmax())
    # On the host, so that a seed gives the same numbers for every device.
    chances = probabilities(logits.cpu(), decoding)
    return int(torch.multinomial(chances, 1, generator=drawing))


def probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    """Probabilities to sample a token with: float64 `[..., vocab_size]`, from logits of the same shape.

    Temperature comes first, then the `top_k` most probable tokens (Fan et al., "Hierarchical Neural Story Generation",
    2018; tokens that tie with the last are kept too), then the fewest of these whose probabilities add up to `top_p`
    (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020). transformers' `generate` uses this order.
    """
    highest = logits.max(dim=-1, keepdim=True).values
    scores = (logits - highest).double() / decoding.temperature
    if decoding.top_k is not None and decoding.top_k < scores.shape[-1]:
        least = scores.topk(decoding.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    chances = scores.softmax(dim=-1)
    if decoding.top_p is not None:
        ordered, tokens = chances.sort(dim=-1, descending=True, stable=True)
        more_probable = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(more_probable >= decoding.top_p, 0)
        chances = torch.zeros_like(chances).scatter(-1, tokens, ordered)
        chances = chances / chances.sum(dim=-1, keepdim=True)
    return chances
