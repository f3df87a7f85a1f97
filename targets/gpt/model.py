"""A decoder-only transformer: learned or rotary positions, no biases in linear layers, a tied head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.targets.gpt.config import Config
from memscope.targets.gpt.experts import RoutedExperts

__all__ = ["Decoder"]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _norm(config: Config) -> nn.Module:
    return nn.LayerNorm(config.dim) if config.style == "gpt" else nn.RMSNorm(config.dim, eps=1e-5)


class CausalAttention(nn.Module):
    """Causal self-attention; with `rotary` `[seq, head_dim / 2]` angles, queries and keys are rotated."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.dropout, self.eager = config.n_heads, config.dropout, config.attention == "eager"
        self.qkv, self.out = _linear(config.dim, 3 * config.dim), _linear(config.dim, config.dim)

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """`[batch, seq, dim]` to the same."""
        batch, seq, dim = x.shape
        q, k, v = (one.view(batch, seq, self.heads, -1).transpose(1, 2) for one in self.qkv(x).split(dim, dim=-1))
        if rotary is not None:
            q, k = _rotated(q, rotary), _rotated(k, rotary)
        dropout = self.dropout if self.training else 0.0
        if self.eager:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
            later = torch.ones(seq, seq, dtype=torch.bool, device=x.device).triu(1)
            weights = F.dropout(F.softmax(scores.masked_fill(later, float("-inf")), dim=-1), dropout)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, seq, dim))  # type: ignore[no-any-return]


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs of channels (i, i + half) of `[batch, heads, seq, head_dim]`."""
    one, two = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


class GeluMlp(nn.Module):
    """`down(gelu(up(x)))` with four times the channels inside."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up, self.down = _linear(config.dim, 4 * config.dim), _linear(4 * config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, dim]` to the same."""
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class SwigluMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` with 8/3 of the channels inside, so that it has as many weights as `GeluMlp`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        inner = 8 * config.dim // 3
        self.gate, self.up = _linear(config.dim, inner), _linear(config.dim, inner)
        self.down = _linear(inner, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, dim]` to the same."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalized input and added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = _norm(config), _norm(config)
        self.attention = CausalAttention(config)
        dense = GeluMlp(config) if config.style == "gpt" else SwigluMlp(config)
        self.mlp = dense if config.experts is None else RoutedExperts(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """`[batch, seq, dim]` to the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class WeightedResiduals(nn.Module):
    """After each layer, a weighted sum of the embedding and of what every layer so far gave, with trained weights.

    At the start the last result has weight 1 and the others 0, so that the model begins as one without it. Source:
    Pagliardini et al., *DenseFormer*, arXiv 2402.02622, equation 1.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(F.one_hot(torch.tensor(i), i + 1).float() for i in range(1, layers + 1))

    def forward(self, results: list[Tensor]) -> Tensor:
        """The sum of the results so far, `[batch, seq, dim]` each: the embedding's first."""
        weights = self.weights[len(results) - 2]
        total: Tensor = weights[0] * results[0]
        for weight, result in zip(weights[1:], results[1:], strict=True):
            total = total + weight * result
        return total


class Decoder(nn.Module):
    """The whole model. Weights begin as GPT-2's: normal, 0.02; those that end a residual branch smaller with depth."""

    angles: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.seq_len, config.dim) if config.style == "gpt" else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.residuals = WeightedResiduals(config.n_layers) if config.residual == "all" else None
        self.norm = _norm(config)
        half = config.dim // config.n_heads // 2
        frequencies = 10_000.0 ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(config.seq_len), frequencies)
        self.register_buffer("angles", angles, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                ends_branch = name.endswith(("attention.out.weight", "mlp.down.weight", "mlp.down"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers) if ends_branch else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids `[batch, seq]` to logits `[batch, seq, vocab_size]`."""
        x = self.tokens(tokens)
        rotary = None if self.positions is not None else self.angles[: tokens.size(1)]
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.size(1)]
        x = self.dropout(x)
        results = [x]
        for layer in self.layers:
            x = layer(x, rotary)
            if self.residuals is not None:
                results.append(x)
                x = self.residuals(results)
        return F.linear(self.norm(x), self.tokens.weight)
