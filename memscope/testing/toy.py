"""A toy workload: small enough to run anywhere in milliseconds, with the parts that strategies look for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memscope.workload.description import HeadLoss, Workload
from memscope.workload.split import split_batch

__all__ = ["toy_workload"]

_VOCAB, _DIM = 40, 16
_IGNORED = -100  # a label without a loss: the default `ignore_index` of torch.nn.functional.cross_entropy


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm over the tokens of all samples."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[samples, tokens, dim]` to the same shape."""
        return super().forward(x.flatten(0, 1)).view_as(x)


class _Block(nn.Module):
    def __init__(self, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.norm = _BatchNorm(_DIM) if batch_norm else nn.LayerNorm(_DIM)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(_DIM, _DIM, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(_DIM, 2 * _DIM), nn.Linear(2 * _DIM, _DIM)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, samples: Tensor | None) -> Tensor:
        h = self.norm(x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if samples is not None:
            hidden |= samples[0, :, None] != samples
        scores = (self.wq(h) @ self.wk(h).transpose(1, 2)).masked_fill(hidden, float("-inf"))
        x = x + self.wo(scores.softmax(-1) @ self.wv(h))
        x = x + self.dropout(self.down(F.gelu(self.up(x))))
        return x


class _Toy(nn.Module):
    def __init__(self, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCAB, _DIM)
        self.blocks = nn.ModuleList(_Block(dropout, batch_norm) for _ in range(2))
        self.head = nn.Linear(_DIM, _VOCAB, bias=False)

    def forward(self, tokens: Tensor, samples: Tensor | None = None, *, with_head: bool = True) -> Tensor:
        x: Tensor = self.embed(tokens)
        for block in self.blocks:
            x = block(x, samples)
        return self.head(x) if with_head else x


def toy_workload(*, dropout: float = 0.0, batch_norm: bool = False) -> Workload:
    """A language model of 5,536 random float32 weights with the parts that strategies look for.

    The parts are `embed`, two layers in `blocks` (attention `wq wk wv wo`, MLP `up down`), and `head`. A step's batch
    has 8 samples of 4 to 11 tokens; every token but the first of a sample is a target, so micro-batches differ in size
    and weight. `dropout` applies to the MLPs; `batch_norm` replaces the layers' layer norm.
    """
    return Workload(
        model=_Toy(dropout, batch_norm),
        batches=[[[(7 * sample + 3 * i) % _VOCAB for i in range(4 + sample)] for sample in range(8)]],
        loss=_loss,
        optimizer_factory=torch.optim.AdamW,
        name="toy",
        split=_split,
        weight=lambda batch: float((_labels(batch) != _IGNORED).sum()),
        packed=_packed,
        head_loss=HeadLoss("head", _head_inputs),
    )


_Batch = Tensor | tuple[Tensor, Tensor]
"""Token IDs `[samples, longest]`; of packed samples `[1, tokens]`, with the number of the sample of each token."""


def _loss(model: nn.Module, batch: _Batch) -> Tensor:
    logits = _run(model, batch)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), _labels(batch).flatten(), ignore_index=_IGNORED)


def _head_inputs(model: nn.Module, batch: _Batch) -> tuple[Tensor, Tensor]:
    return _run(model, batch, with_head=False), F.pad(_labels(batch), (0, 1), value=_IGNORED)


def _run(model: nn.Module, batch: _Batch, **options: bool) -> Tensor:
    tokens, samples = batch if isinstance(batch, tuple) else (batch, None)
    return model(tokens.clamp(min=0), samples, **options)  # type: ignore[no-any-return]


def _labels(batch: _Batch) -> Tensor:
    """The next token of every token but the last, if both are of the same sample."""
    if isinstance(batch, tuple):
        tokens, samples = batch
        return tokens[:, 1:].masked_fill(samples[:, 1:] != samples[:, :-1], _IGNORED)
    return batch[:, 1:]


def _pieces(samples: list[list[int]], parts: int) -> list[list[Tensor]]:
    return [[torch.tensor(sample) for sample in piece] for piece in split_batch(samples, parts)]


def _split(samples: list[list[int]], parts: int) -> list[Tensor]:
    """Token IDs `[samples, longest]` of each micro-batch."""
    pieces = _pieces(samples, parts)
    return [pad_sequence(piece, batch_first=True, padding_value=_IGNORED) for piece in pieces]


def _packed(samples: list[list[int]], parts: int) -> list[tuple[Tensor, Tensor]]:
    """Token IDs `[1, tokens]` of each micro-batch, and the number of each token's sample."""
    return [
        (torch.cat(piece)[None], torch.cat([torch.full_like(one, number) for number, one in enumerate(piece)])[None])
        for piece in _pieces(samples, parts)
    ]
