"""Generation: one forward pass for each new token, over that token with a KV cache, or over the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from memscope.errors import MemscopeError, UsageError
from memscope.targets.llama2.beam_search import beam_search
from memscope.targets.llama2.cache import Cache
from memscope.targets.llama2.decoding import Continuation, Decoding, Limit, TextSearch
from memscope.targets.llama2.model import Architecture, Llama
from memscope.targets.llama2.sampling import one_by_one

__all__ = ["Continuation", "Decoding", "check_prompts", "generate"]

_PAD_ID = 0
"""Pads short rows on the right. Any id would do: see `_NextLogits._of_all`."""


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    eos_id: int | None,
    on_token: Callable[[list[tuple[int, ...]]], None] = lambda new: None,
) -> list[Continuation]:
    """Continue prompts of any lengths. Each result is the same as for that prompt alone.

    Dropout is off. Between tokens, only the model and, with `Decoding.cache`, keys and values stay on the device.

    Args:
        model: the model, on any device.
        prompts: token ids, BOS included.
        decoding: settings that choose the next token.
        eos_id: the token that ends a text; None: no token does.
        on_token: called after each forward pass with the new tokens of every prompt so far; in beam search, with those
            of the best beam, which may still be replaced.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        UsageError: a prompt is empty, fills the context, or has a token outside the model's vocabulary.
        MemscopeError: logits are not finite.
    """
    check_prompts(prompts, model.arch)
    searches = [_search(model, prompt, decoding, eos_id, index) for index, prompt in enumerate(prompts)]
    wanted = {index: next(search) for index, search in enumerate(searches)}
    done: dict[int, Continuation] = {}
    next_logits = _NextLogits(model, Cache(len(model.layers)) if decoding.cache else None)
    training = model.training
    model.eval()
    try:
        while wanted:
            done |= _advance(next_logits, searches, wanted)
            on_token([_new_tokens(prompt, index, wanted, done) for index, prompt in enumerate(prompts)])
    finally:
        model.train(training)
    return [done[index] for index in range(len(prompts))]


def check_prompts(prompts: Sequence[Sequence[int]], arch: Architecture) -> None:
    """Check prompts as `generate` does, before a model is loaded.

    Raises:
        UsageError: a prompt is empty, fills the context, or has a token outside the model's vocabulary.
    """
    context, vocab_size = arch.max_seq_len, arch.vocab_size
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {index + 1} is empty: expected at least one token")
        if len(prompt) >= context:
            raise UsageError(
                f"prompt {index + 1} has {len(prompt)} tokens, which leaves no room in the context (max_seq_len) of "
                f"{context}: shorten it to {context - 1} tokens or fewer"
            )
        unknown = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise UsageError(
                f"prompt {index + 1} has token {unknown}, but the model's tokens are 0 to {vocab_size - 1}: "
                "use the model's own tokenizer"
            )


def _search(model: Llama, prompt: Sequence[int], decoding: Decoding, eos_id: int | None, index: int) -> TextSearch:
    room = model.arch.max_seq_len - len(prompt)
    by_length = decoding.max_new_tokens <= room
    limit = Limit(decoding.max_new_tokens, "length") if by_length else Limit(room, "context")
    if decoding.beams > 1:
        return beam_search(prompt, limit, decoding, eos_id)
    return one_by_one(prompt, limit, decoding, eos_id, torch.Generator().manual_seed(decoding.seed + index))


def _advance(
    next_logits: _NextLogits, searches: Sequence[TextSearch], wanted: dict[int, list[list[int]]]
) -> dict[int, Continuation]:
    """One forward pass for all unfinished prompts. Updates `wanted`; returns the continuations that ended."""
    logits = next_logits([row for rows in wanted.values() for row in rows])
    if not logits.isfinite().all():
        raise MemscopeError("the model's logits are not finite: its weights, or those of the adapter, are broken")
    parts = logits.split([len(rows) for rows in wanted.values()])
    done = {}
    for index, part in zip(list(wanted), parts, strict=True):
        try:
            wanted[index] = searches[index].send(part)
        except StopIteration as end:
            done[index] = end.value
            del wanted[index]
    return done


class _NextLogits:
    """Computes the logits of the token after each sequence."""

    def __init__(self, model: Llama, cache: Cache | None) -> None:
        self._model, self._cache = model, cache
        self._known: dict[tuple[int, ...], int] = {}
        """The sequences in the cache, each with its row."""

    @torch.inference_mode()
    def __call__(self, rows: list[list[int]]) -> Tensor:
        """Logits `[rows, vocab_size]`; after the first call, each sequence is one of the call before and a token."""
        logits = self._of_last(rows, self._cache) if self._cache else self._of_all(rows)
        if self._cache is not None:
            self._known = {tuple(row): index for index, row in enumerate(rows)}
        return logits

    def _of_all(self, rows: list[list[int]]) -> Tensor:
        """Pass whole sequences through the model.

        Padding on the right needs neither a mask nor shifted positions: attention is causal, so no token sees the
        padding after it, and logits are read at the end of each sequence.
        """
        model, lengths = self._model, [len(row) for row in rows]
        device, longest = model.freqs_cis.device, max(lengths)
        tokens = torch.tensor([row + [_PAD_ID] * (longest - len(row)) for row in rows], device=device)
        places = torch.tensor([length - 1 for length in lengths], device=device)
        logits: Tensor = model(tokens, places, cache=self._cache) if self._cache is not None else model(tokens, places)
        if self._cache is not None:
            self._cache.begin(lengths)
        return logits

    def _of_last(self, rows: list[list[int]], cache: Cache) -> Tensor:
        """Pass the last token of each sequence through the model; the others are in the cache."""
        device = self._model.freqs_cis.device
        cache.choose([self._known[tuple(row[:-1])] for row in rows])
        tokens = torch.tensor([row[-1:] for row in rows], device=device)
        logits: Tensor = self._model(tokens, cache=cache)[:, -1]
        return logits


def _new_tokens(
    prompt: Sequence[int], index: int, wanted: Mapping[int, list[list[int]]], done: Mapping[int, Continuation]
) -> tuple[int, ...]:
    return done[index].tokens if index in done else tuple(wanted[index][0][len(prompt) :])
