"""Beam search: follow several sequences at once and keep those with the highest log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from memscope.targets.llama2.decoding import Continuation, Decoding, Limit, TextSearch

__all__ = ["beam_search"]

_Beam = tuple[float, list[int]]
"""A score and the new tokens it belongs to."""


def beam_search(prompt: Sequence[int], limit: Limit, decoding: Decoding, eos_id: int | None) -> TextSearch:
    """Continue a prompt with the best-scoring text; see `decoding.TextSearch`.

    The score of a finished text is log-probability / length ** length_penalty, where the length counts the new tokens,
    EOS included. The search ends when there are as many finished texts as beams, and the best unfinished text, scored
    at its present length, is no better than the worst of them. These are the rules of transformers' `generate` with
    its default, `early_stopping=False` (transformers 5.23, generation/utils.py, `_beam_search`).
    """
    width = decoding.beams
    beams: list[_Beam] = [(0.0, [])]
    finished: list[_Beam] = []
    for length in range(1, limit.tokens + 1):
        # Twice as many candidates as beams: at most one continuation of each beam is EOS, so enough can go on.
        candidates = _best((yield [[*prompt, *new] for _, new in beams]), beams, 2 * width)
        ended = [length == limit.tokens or new[-1] == eos_id for _, new in candidates]
        scale = length**decoding.length_penalty
        # Only the best `width` candidates may count as finished; the others replace ended ones as beams.
        finished += [(score / scale, new) for (score, new), end in zip(candidates[:width], ended, strict=False) if end]
        finished = sorted(finished, key=itemgetter(0), reverse=True)[:width]
        beams = [beam for beam, end in zip(candidates, ended, strict=True) if not end][:width]
        if not beams or (len(finished) == width and beams[0][0] / scale <= finished[-1][0]):
            break
    return Continuation.of(finished[0][1], eos_id, limit)


def _best(logits: Tensor, beams: Sequence[_Beam], count: int) -> list[_Beam]:
    """The best continuations by one token, best first, from the logits `[beams, vocab_size]` of that token."""
    before = torch.tensor([score for score, _ in beams], dtype=logits.dtype, device=logits.device)
    scores = logits.log_softmax(dim=-1) + before[:, None]
    best = scores.flatten().topk(min(count, scores.numel()))
    found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    vocab_size = logits.shape[1]
    return [(score, [*beams[index // vocab_size][1], index % vocab_size]) for score, index in found]
