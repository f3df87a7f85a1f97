"""How long a sample may be: the positions of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from memscope.errors import UsageError

__all__ = ["SampleLength", "fitting_length"]

_DEFAULT = 1024
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_RELATIVE = ("t5", "mt5", "longt5", "umt5")
"""Types of models with relative positions."""
_TABLE = re.compile(r"(^|[._])(wpe|embed_positions|position_embeddings|position_embedding|pos_embed)$")
"""Modules that hold a vector per position, by the names that transformers gives them."""


@dataclass(frozen=True)
class SampleLength:
    """How long the samples are."""

    tokens: int
    positions: int | None
    """Tokens that the model was made for; None: any number."""
    notes: tuple[str, ...] = ()
    """A note if the samples are longer than that."""


def fitting_length(model: nn.Module, config: Any, wanted: int | None, name: str) -> SampleLength:
    """The length of a sample.

    Args:
        model: the model, for its tables of positions.
        config: the configuration of its text part.
        wanted: the length that the user asks for; None: 1,024, or as many as the model has.
        name: the model's name, for messages.

    Raises:
        UsageError: the model has learned positions, and fewer than wanted.
    """
    most = next(
        (value for key in _POSITIONS if isinstance(value := getattr(config, key, None), int) and value > 0), None
    )
    table = _learned(model)
    if table is not None:
        most = table if most is None else min(table, most)
    limit = None if config.model_type in _RELATIVE else most  # their `n_positions` limits nothing
    if wanted is None:
        return SampleLength(min(_DEFAULT, most or _DEFAULT), limit)
    if limit is None or wanted <= limit:
        return SampleLength(wanted, limit)
    if table is not None:
        raise UsageError(f"hf: seq_len={wanted}: {name} has {limit} learned positions: choose at most {limit}")
    return SampleLength(
        wanted, limit, (f"seq_len={wanted} is beyond the {limit} positions in the configuration of {name}",)
    )


def _learned(model: nn.Module) -> int | None:
    """Rows of the smallest learned table of positions that a token can have; None: there is no such table."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and "vision" not in name and "visual" not in name:
            # RoBERTa's positions begin after its padding token.
            kept = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - kept)
    return min(found, default=None)
