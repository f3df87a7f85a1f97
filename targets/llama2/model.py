"""LLaMA2 as in Meta's reference code, without model parallelism; a KV cache is used if one is given.

Module names, the order of operations and their precision are Meta's (facebookresearch/llama, llama/model.py), so the
weights load by name and every tensor of the forward pass has the same size as there. Later models of the family
differ in three places: a stretched rotary embedding and a tied head (LLaMA 3), and a sliding window (Mistral).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.targets.llama2.cache import Cache, LayerCache

__all__ = ["Architecture", "Llama", "Packed"]


@dataclass(frozen=True)
class Architecture:
    """Settings that define the model. Names are those of Meta's `params.json` where it has the setting."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None
    """Heads of keys and values, each shared by `n_heads / n_kv_heads` query heads; None: `n_heads`."""
    vocab_size: int
    multiple_of: int
    ffn_dim_multiplier: float | None
    norm_eps: float
    rope_theta: float
    rope_scaling: tuple[float, float, float, int] | None
    """LLaMA 3.1's: factor, low and high frequency factor, original context; see `stretched`."""
    sliding_window: int | None
    """Number of tokens each token attends to, itself included; None: all earlier tokens."""
    tied_head: bool
    """Whether embedding and output head are one parameter."""
    max_seq_len: int
    attention: str
    """`eager`: scores, mask and softmax as single operations; `sdpa`: `F.scaled_dot_product_attention`."""
    dtype: torch.dtype

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def hidden_dim(self) -> int:
        """Inner size of the feed-forward: two thirds of 4·dim, times the multiplier, rounded up to `multiple_of`."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        """Make a linear layer without bias, in the model's dtype."""
        return nn.Linear(inputs, outputs, bias=False, dtype=self.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    # Keep float64: tests compare gradients far below the precision of float32.
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Root-mean-square normalization, computed in float32 and cast back."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.eps = arch.norm_eps
        self.weight = nn.Parameter(torch.ones(arch.dim, dtype=arch.dtype))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, dim]` to the same."""
        output = self._norm(_at_least_float32(x)).type_as(x)
        return output * self.weight


def rotations(arch: Architecture) -> Tensor:
    """The complex factors of the rotary embedding: complex64 `[2 * max_seq_len, head_dim / 2]`.

    They cover twice the context, as in Meta's code.
    """
    freqs = 1.0 / (arch.rope_theta ** (torch.arange(0, arch.head_dim, 2).float() / arch.head_dim))
    if arch.rope_scaling is not None:
        freqs = stretched(freqs, *arch.rope_scaling)
    angles = torch.outer(torch.arange(2 * arch.max_seq_len), freqs).float()
    return torch.polar(torch.ones_like(angles), angles)


def stretched(freqs: Tensor, factor: float, low: float, high: float, original_context: int) -> Tensor:
    """Frequencies `[head_dim / 2]` for a context `factor` times as long as the original one.

    Frequencies with fewer than `low` turns in the original context are divided by `factor`, those with more than `high`
    are kept, and those in between are interpolated. Source: `apply_scaling` in meta-llama/llama-models,
    models/llama3/model.py, where the constants are 8, 1, 4 and 8192.
    """
    turns = original_context * freqs / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / factor)


def rotate(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys `[batch, seq, heads, head_dim]`: neighbors form one complex number.

    The factors are those of the positions, `[seq, head_dim / 2]`, or of each row's own, `[batch, seq, head_dim / 2]`.
    """
    xq_ = torch.view_as_complex(_at_least_float32(xq).reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(_at_least_float32(xk).reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = freqs_cis.view(-1, xq_.shape[1], 1, xq_.shape[3])
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


def repeat_kv(x: Tensor, repeats: int) -> Tensor:
    """Copy each head of `[batch, seq, kv_heads, head_dim]` for the query heads that share it."""
    if repeats == 1:
        return x
    batch, seq, kv_heads, head_dim = x.shape
    return x[:, :, :, None, :].expand(batch, seq, kv_heads, repeats, head_dim).reshape(batch, seq, -1, head_dim)


@dataclass(frozen=True)
class Packed:
    """Which token belongs to which of several samples in one row."""

    positions: Tensor
    """Position of each token in its own sample, int64 `[1, seq]`."""
    samples: Tensor
    """Number of the sample of each token, int64 `[1, seq]`."""


def causal_mask(h: Tensor, window: int | None, packed: Packed | None = None) -> Tensor:
    """The mask `[seq, seq]` to add to the scores so that no token sees a later one: −∞ above the diagonal.

    With a window, tokens `window` or more positions back are −∞ too; of packed samples, those of other samples.
    """
    seq = h.shape[1]
    mask = torch.full((seq, seq), float("-inf"), device=h.device)
    mask = torch.triu(mask, diagonal=1)
    if window is not None:
        mask += torch.full_like(mask, float("-inf")).tril_(diagonal=-window)
    if packed is not None:
        mask.masked_fill_(packed.samples[0, :, None] != packed.samples, float("-inf"))
    return mask.type_as(h)


class Attention(nn.Module):
    """Causal self-attention with rotary embedding; query heads may share heads of keys and values."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.sdpa = arch.attention == "sdpa"
        self.n_heads = arch.n_heads
        self.kv_heads = arch.kv_heads
        self.head_dim = arch.head_dim
        self.wq = arch.linear(arch.dim, self.n_heads * self.head_dim)
        self.wk = arch.linear(arch.dim, self.kv_heads * self.head_dim)
        self.wv = arch.linear(arch.dim, self.kv_heads * self.head_dim)
        self.wo = arch.linear(self.n_heads * self.head_dim, arch.dim)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, past: LayerCache | None = None) -> Tensor:
        """`[batch, seq, dim]` to the same. Without a mask attention is causal; a single token sees all of the past."""
        batch, seq, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(batch, seq, self.n_heads, self.head_dim)
        xk = xk.view(batch, seq, self.kv_heads, self.head_dim)
        xv = xv.view(batch, seq, self.kv_heads, self.head_dim)
        xq, xk = rotate(xq, xk, freqs_cis)
        if past is not None:
            xk, xv = past.extended(xk, xv)

        xq = xq.transpose(1, 2)  # [batch, heads, seq, head_dim]
        keys = repeat_kv(xk, self.n_heads // self.kv_heads).transpose(1, 2)
        values = repeat_kv(xv, self.n_heads // self.kv_heads).transpose(1, 2)
        if self.sdpa:
            is_causal = mask is None and (past is None or seq > 1)
            output = F.scaled_dot_product_attention(xq, keys, values, attn_mask=mask, is_causal=is_causal)
        else:
            scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)
            if mask is not None:
                scores = scores + mask  # [batch, heads, seq, columns]
            scores = F.softmax(_at_least_float32(scores), dim=-1).type_as(xq)
            output = torch.matmul(scores, values)
        output = output.transpose(1, 2).contiguous().view(batch, seq, -1)
        return self.wo(output)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1(x)) * w3(x))`."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.w1 = arch.linear(arch.dim, arch.hidden_dim)
        self.w2 = arch.linear(arch.hidden_dim, arch.dim)
        self.w3 = arch.linear(arch.dim, arch.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, dim]` to the same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on a normalized input and added to the residual stream."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.attention = Attention(arch)
        self.feed_forward = FeedForward(arch)
        self.attention_norm = RMSNorm(arch)
        self.ffn_norm = RMSNorm(arch)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, past: LayerCache | None = None) -> Tensor:
        """`[batch, seq, dim]` to the same."""
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, past)
        return h + self.feed_forward(self.ffn_norm(h))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The whole model, with PyTorch's default initialization, so that it trains from scratch."""

    freqs_cis: Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.tok_embeddings = nn.Embedding(arch.vocab_size, arch.dim, dtype=arch.dtype)
        self.layers = nn.ModuleList(TransformerBlock(arch) for _ in range(arch.n_layers))
        self.norm = RMSNorm(arch)
        self.output = arch.linear(arch.dim, arch.vocab_size)
        if arch.tied_head:
            self.tok_embeddings.weight = self.output.weight
        # A buffer, so that it moves with the model; not persistent, so that the state dict holds only Meta's weights.
        self.register_buffer("freqs_cis", rotations(arch), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        places: Tensor | None = None,
        *,
        packed: Packed | None = None,
        with_head: bool = True,
        cache: Cache | None = None,
    ) -> Tensor:
        """Token ids `[batch, seq]` to logits `[batch, seq, vocab_size]` in float32; `seq` up to `2 * max_seq_len`.

        With `places` `[batch]`, only to the logits at that position of each row: `[batch, vocab_size]`. Without the
        head, to its input `[..., dim]`. Packed samples are one row of tokens. An empty cache takes in the tokens; one
        that has seen some is given the next token of each row, `[batch, 1]`.
        """
        h = self.tok_embeddings(tokens)
        if cache:
            freqs_cis = self.freqs_cis[cache.grow(h.device), None]
            mask = cache.mask(h, self.arch.sliding_window)
        else:
            freqs_cis = self.freqs_cis[: tokens.shape[1]] if packed is None else self.freqs_cis[packed.positions[0]]
            mask = self._mask(h, packed)
        for index, layer in enumerate(self.layers):
            h = layer(h, freqs_cis, mask) if cache is None else layer(h, freqs_cis, mask, cache.layers[index])
        if places is not None:
            h = h[torch.arange(len(h), device=h.device), places]
        h = self.norm(h)
        return _at_least_float32(self.output(h)) if with_head else h

    def _mask(self, h: Tensor, packed: Packed | None) -> Tensor | None:
        """The mask, or None if `is_causal=True` suffices: a window as long as the sequence hides nothing."""
        window = self.arch.sliding_window
        if window is not None and window >= h.shape[1]:
            window = None
        is_needed = self.arch.attention == "eager" or window is not None or packed is not None
        return causal_mask(h, window, packed) if is_needed else None
