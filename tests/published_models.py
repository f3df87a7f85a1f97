"""Models and attention of published measurements, operator by operator as in the libraries that were measured.

Written after transformers 4.48.1 (models/mistral, models/gpt_bigcode), peft 0.13.2 (tuners/lora), flash-attn 2.7.3
(flash_attn_interface.py; csrc/flash_attn/flash_api.cpp, mha_fwd and mha_bwd) and PyTorch 2.4.1, so that a test needs
none of them. Dimensions: B samples, S tokens, H heads, D values a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["BigCode", "BigCodeSize", "Mistral", "MistralSize"]


class FlashAttention(torch.autograd.Function):
    """The allocations of flash-attn's `flash_attn_func`, queries `[B, S, H, D]`, keys and values with fewer heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, saves: bool) -> Tensor:
        batch, length, heads, _ = q.shape
        out = torch.empty_like(q)
        lse = q.new_empty((batch, heads, length), dtype=torch.float32)
        rng_state = q.new_empty(2, dtype=torch.int64)
        if saves:
            ctx.save_for_backward(q, k, v, out, lse, rng_state)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *_ = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _backward_kernels(q, dk, dv)
        return dq, dk, dv, None


def _backward_kernels(q: Tensor, dk: Tensor, dv: Tensor) -> None:
    batch, length, heads, width = q.shape
    rounded = -(-length // 128) * 128
    softmax_d = q.new_empty((batch, heads, rounded), dtype=torch.float32)
    dq_accum = q.new_empty((batch, rounded, heads, -(-width // 32) * 32), dtype=torch.float32)
    expanded = [q.new_empty((batch, length, heads, width)) for _ in (dk, dv)]
    for whole, part in zip(expanded, (dk, dv), strict=True):
        torch.sum(whole.reshape(batch, length, part.shape[2], -1, width), 3, out=part)
    del softmax_d, dq_accum


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return FlashAttention.apply(q, k, v, torch.is_grad_enabled() and q.requires_grad)  # type: ignore[no-any-return]


def all_but_last(logits: Tensor) -> Tensor:
    """`logits[..., :-1, :]` as PyTorch 2.4.1 records it: the full slice `:` is an operator of its own.

    Its backward pass makes another tensor. PyTorch 2.13 skips it (pytorch/pytorch pull request 157528).
    """
    return torch.ops.aten.slice.Tensor(torch.ops.aten.slice.Tensor(logits, -2, 0, -1), -1, 0, 2**63 - 1)


def cross_entropy_of_next(logits: Tensor, labels: Tensor) -> Tensor:
    logits_of_next = all_but_last(logits).contiguous()
    targets = labels[..., 1:].contiguous()
    return nn.functional.cross_entropy(logits_of_next.view(-1, logits.shape[-1]), targets.view(-1))


class Lora(nn.Module):
    """peft's LoRA around a Linear, r 16, alpha 16, dropout 0.1, its weights in float32."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.dropout = nn.Dropout(0.1)
        self.lora_a = nn.Linear(base.in_features, 16, bias=False, dtype=torch.float32)
        self.lora_b = nn.Linear(16, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        dtype = result.dtype
        x = x.to(torch.float32)
        result = result + self.lora_b(self.lora_a(self.dropout(x))) * 1.0
        return result.to(dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MistralSize:
    """Mistral-7B, with the row that fms-hf-tuning adds to the embedding for its padding token."""

    vocabulary: int = 32_001
    layers: int = 32
    width: int = 4096
    heads: int = 32
    key_heads: int = 8
    inner: int = 14_336

    @property
    def head(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-5)
        return self.weight * x.to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return (x * cos) + (_swapped(x, half) * sin)


def _swapped(x: Tensor, half: int) -> Tensor:
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class MistralAttention(nn.Module):
    def __init__(self, size: MistralSize) -> None:
        super().__init__()
        self.size = size
        self.q_proj: nn.Module = nn.Linear(size.width, size.width, bias=False)
        self.k_proj: nn.Module = nn.Linear(size.width, size.key_heads * size.head, bias=False)
        self.v_proj: nn.Module = nn.Linear(size.width, size.key_heads * size.head, bias=False)
        self.o_proj: nn.Module = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.size.head)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        out = flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous())  # type: ignore[no-any-return]


class MistralMLP(nn.Module):
    def __init__(self, size: MistralSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.inner, bias=False)
        self.up_proj = nn.Linear(size.width, size.inner, bias=False)
        self.down_proj = nn.Linear(size.inner, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class MistralLayer(nn.Module):
    def __init__(self, size: MistralSize) -> None:
        super().__init__()
        self.self_attn = MistralAttention(size)
        self.mlp = MistralMLP(size)
        self.input_layernorm = RMSNorm(size.width)
        self.post_attention_layernorm = RMSNorm(size.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        residual = x
        x = self.input_layernorm(x)
        x = self.self_attn(x, cos, sin)
        x = residual + x
        residual = x
        x = self.post_attention_layernorm(x)
        x = self.mlp(x)
        return residual + x


class Mistral(nn.Module):
    """MistralForCausalLM with gradient checkpointing of each layer, re-entrant as the Trainer's default is."""

    def __init__(self, size: MistralSize, *, lora: bool) -> None:
        super().__init__()
        self.head = size.head
        self.embed_tokens = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(MistralLayer(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.width)
        self.lm_head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.register_buffer("inv_freq", torch.ones(size.head // 2, dtype=torch.float32))
        if lora:
            self.requires_grad_(False)
            for module in list(self.modules()):
                if isinstance(module, MistralAttention):
                    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                        setattr(module, name, Lora(getattr(module, name)))
            self.embed_tokens.register_forward_hook(lambda *call: call[-1].requires_grad_(True))

    def _cos_and_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = (self.inv_freq[None, :, None] @ positions[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = cos * 1.0, sin * 1.0
        return cos.to(dtype), sin.to(dtype)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.embed_tokens(batch["input_ids"])
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        with torch.no_grad():
            cos, sin = self._cos_and_sin(positions, hidden.dtype)
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, cos, sin, positions, use_reentrant=True)
        logits = self.lm_head(self.norm(hidden))
        return _in_float32(logits, batch["labels"])


def _in_float32(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.float()
    return cross_entropy_of_next(logits, labels)


@dataclass(frozen=True)
class BigCodeSize:
    """SantaCoder, with the 49,158 rows to which fms-hf-tuning resizes the embedding."""

    vocabulary: int = 49_158
    layers: int = 24
    width: int = 2048
    heads: int = 16
    inner: int = 8192
    positions: int = 2048


class BigCodeAttention(nn.Module):
    def __init__(self, size: BigCodeSize) -> None:
        super().__init__()
        self.size, self.key_width = size, size.width // size.heads
        self.c_attn = nn.Linear(size.width, size.width + 2 * self.key_width)
        self.c_proj = nn.Linear(size.width, size.width)
        self.resid_dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        query, present = self.c_attn(x).split((width, 2 * self.key_width), dim=2)
        key, value = present.split((self.key_width, self.key_width), dim=-1)
        query = query.reshape(batch, length, self.size.heads, self.key_width)
        out = flash_attention(query, key.unsqueeze(2), value.unsqueeze(2))
        return self.resid_dropout(self.c_proj(out.reshape(batch, length, width))), present


class BigCodeMLP(nn.Module):
    def __init__(self, size: BigCodeSize) -> None:
        super().__init__()
        self.c_fc = nn.Linear(size.width, size.inner)
        self.c_proj = nn.Linear(size.inner, size.width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = nn.functional.gelu(x, approximate="tanh")
        x = self.c_proj(x)
        return self.dropout(x)  # type: ignore[no-any-return]


class BigCodeLayer(nn.Module):
    def __init__(self, size: BigCodeSize) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(size.width)
        self.attn = BigCodeAttention(size)
        self.ln_2 = nn.LayerNorm(size.width)
        self.mlp = BigCodeMLP(size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        residual = x
        x = self.ln_1(x)
        attended, present = self.attn(x)
        x = attended + residual
        residual = x
        x = self.ln_2(x)
        fed = self.mlp(x)
        x = residual + fed
        return x, present


class BigCode(nn.Module):
    """GPTBigCodeForCausalLM with multi-query attention, its key-value cache at the default, and checkpointed layers."""

    def __init__(self, size: BigCodeSize) -> None:
        super().__init__()
        self.wte = nn.Embedding(size.vocabulary, size.width)
        self.wpe = nn.Embedding(size.positions, size.width)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList(BigCodeLayer(size) for _ in range(size.layers))
        self.ln_f = nn.LayerNorm(size.width)
        mask = torch.ones((size.positions, size.positions), dtype=torch.bool)
        self.register_buffer("bias", torch.tril(mask), persistent=False)
        self.lm_head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden, presents = self._hidden(batch["input_ids"])
        logits = self.lm_head(hidden)
        loss = cross_entropy_of_next(logits, batch["labels"])
        del logits, presents  # freed in the order of the output's fields
        return loss

    def _hidden(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        embedded, placed = self.wte(tokens), self.wpe(positions)  # alive until the last layer, as there
        hidden = embedded + placed
        hidden = self.drop(hidden)
        presents = []
        run: Callable[..., tuple[Tensor, Tensor]] = checkpoint
        for layer in self.h:
            hidden, present = run(layer, hidden, use_reentrant=True)
            presents.append(present)
        return self.ln_f(hidden), presents
