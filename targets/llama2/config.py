"""The settings of `targets/llama2`: the model, its data and its training step. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memscope.errors import UsageError, nearest
from memscope.workload.settings import format_value

if TYPE_CHECKING:
    from memscope.targets.llama2.model import Architecture

__all__ = ["PRESETS", "Config"]

_ATTENTION = ("eager", "sdpa")
_MODES = ("train", "generate")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}


@dataclass(frozen=True)
class Config:
    """The model, its data and its training step. The defaults are LLaMA2-7B.

    Raises:
        UsageError: a value is invalid; the message lists every problem.
    """

    dim: int = 4096
    """Size of the residual stream."""
    n_layers: int = 32
    """Number of transformer layers."""
    n_heads: int = 32
    """Number of query heads; dim / n_heads is the size of a head."""
    n_kv_heads: int | None = None
    """Number of key and value heads; none: n_heads."""
    vocab_size: int = 32_000
    """Rows of the embedding and of the output head; at least the size of the tokenizer's vocabulary."""
    multiple_of: int = 256
    """Round the feed-forward's inner size up to a multiple of this."""
    ffn_dim_multiplier: float | None = None
    """Factor on the feed-forward's inner size, 8/3 of dim, before rounding; none: no factor."""
    norm_eps: float = 1e-5
    """Epsilon that RMSNorm adds to the mean square."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding's wavelengths."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Stretched wavelengths, as in LLaMA 3.1: factor, low and high frequency factor, original context, joined by +."""
    sliding_window: int | None = None
    """Number of tokens each token attends to, itself included, as in Mistral; none: all earlier tokens."""
    tied_head: bool = False
    """Use the embedding as the output head too."""
    max_seq_len: int = 4096
    """Context: maximum length of a sample, in tokens."""
    attention: str = "eager"
    """eager: scores, mask and softmax as single operations, as in Meta's code; sdpa: scaled_dot_product_attention."""
    dtype: str = "fp32"
    """Dtype of the weights: fp32 or bf16; fp64 is for exact comparisons."""
    weights: str | None = None
    """Folder with weights in Meta's or Hugging Face's format, converted to dtype; none: random weights."""
    data: str | None = None
    """Instruction data, a JSON file in Alpaca's format; none: the small data set shipped with memscope."""
    tokenizer: str | None = None
    """SentencePiece model file; none: the small tokenizer shipped with memscope."""
    samples: int = 200
    """Number of samples to use, from the start of the data."""
    seq_len: int | None = None
    """Repeat or cut every sample to exactly this many tokens, all of them targets; none: the lengths of the data."""
    micro_batch: int = 1
    """Samples per micro-batch."""
    accumulation: int = 8
    """Micro-batches per optimizer step."""
    mode: str = "train"
    """train: a training step; generate: continue the prompts of `micro_batch` samples, without gradients."""
    new_tokens: int = 64
    """With mode=generate: tokens to add to each prompt."""
    cache: bool = True
    """With mode=generate: keep keys and values of earlier tokens (a KV cache)."""
    beams: int = 1
    """With mode=generate: sequences that beam search follows for each prompt; 1: greedy decoding."""
    lr: float = 1e-5
    """Learning rate of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    seed: int = 0
    """Seed of random weights; in fine-tuning, also of the order of samples and of dropout."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise UsageError("targets/llama2 cannot be built:\n" + "\n".join(f"  {problem}" for problem in problems))

    @property
    def architecture(self) -> Architecture:
        """The settings that define the model."""
        import torch

        from memscope.targets.llama2.model import Architecture

        names = [field.name for field in dataclasses.fields(Architecture)]
        return Architecture(
            **{name: getattr(self, name) for name in names} | {"dtype": getattr(torch, _DTYPES[self.dtype])}
        )


_COUNTS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "sliding_window", "max_seq_len", "samples",
    "micro_batch", "accumulation", "new_tokens", "beams",
)  # fmt: skip


def _problems(config: Config) -> Iterator[str]:
    counts = {name: getattr(config, name) for name in _COUNTS if getattr(config, name) is not None}
    bad = {name: value for name, value in counts.items() if value < 1}
    for name, value in bad.items():
        yield f"{name}={value}: expected a whole number from 1"
    for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            yield f"{name}={getattr(config, name)}: expected a number above 0"
    for name in ("lr", "weight_decay"):
        if not getattr(config, name) >= 0:
            yield f"{name}={getattr(config, name)}: expected 0 or more"
    if not bad.keys() & {"dim", "n_heads"} and config.dim % (2 * config.n_heads):
        yield (
            f"dim={config.dim} with n_heads={config.n_heads}: the rotary embedding needs heads of an even size, "
            f"so dim must be a multiple of {2 * config.n_heads}"
        )
    if config.n_kv_heads and not bad.keys() & {"n_heads", "n_kv_heads"} and config.n_heads % config.n_kv_heads:
        yield f"n_kv_heads={config.n_kv_heads}: expected a divisor of n_heads={config.n_heads}"
    if config.rope_scaling is not None:
        factor, low, high, original_context = config.rope_scaling
        if factor < 1 or not 0 < low < high or original_context < 1:
            yield f"rope_scaling={format_value(config.rope_scaling)}: expected factor ≥ 1, 0 < low < high, context ≥ 1"
    if config.seq_len is not None and not 2 <= config.seq_len <= config.max_seq_len:
        yield f"seq_len={config.seq_len}: expected 2 to max_seq_len={config.max_seq_len}"
    if config.mode not in _MODES:
        yield f'mode="{config.mode}": {nearest(config.mode, _MODES)}'
    if config.mode != "generate":
        given = {"new_tokens": 64, "cache": True, "beams": 1}
        for name in [name for name, default in given.items() if getattr(config, name) != default]:
            yield f"{name}={format_value(getattr(config, name))}: only mode=generate uses it: add mode=generate"
    if config.attention not in _ATTENTION:
        yield f'attention="{config.attention}": {nearest(config.attention, _ATTENTION)}'
    if config.dtype not in _DTYPES:
        yield f'dtype="{config.dtype}": {nearest(config.dtype, ("fp32", "bf16"))}'


_MISTRAL_7B = Config(n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3, max_seq_len=32_768, sliding_window=4096)
_LLAMA3_8B = Config(
    n_kv_heads=8, vocab_size=128_256, multiple_of=1024, ffn_dim_multiplier=1.3, rope_theta=500_000.0, max_seq_len=8192
)
_LLAMA31_8B = replace(_LLAMA3_8B, rope_scaling=(8.0, 1.0, 4.0, 8192), max_seq_len=131_072)
_LLAMA32_3B = replace(
    _LLAMA31_8B,
    dim=3072,
    n_layers=28,
    n_heads=24,
    multiple_of=256,
    ffn_dim_multiplier=1.0,
    rope_scaling=(32.0, 1.0, 4.0, 8192),
    tied_head=True,
)
_LLAMA32_1B = replace(_LLAMA32_3B, dim=2048, n_layers=16, n_heads=32, ffn_dim_multiplier=1.5)

# Shapes: Meta's params.json of Llama-2-7b, -13b, -70b, Meta-Llama-3-8B, Llama-3.1-8B, Llama-3.2-1B and -3B. Context,
# rope_scaling and tied_head of the last four, and Mistral: config.json of these and of mistralai/Mistral-7B-v0.1.
PRESETS = {
    "7b": Config(),
    "13b": Config(dim=5120, n_layers=40, n_heads=40),
    "70b": Config(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
    "mistral-7b": _MISTRAL_7B,
    "llama3-8b": _LLAMA3_8B,
    "llama3.1-8b": _LLAMA31_8B,
    "llama3.2-1b": _LLAMA32_1B,
    "llama3.2-3b": _LLAMA32_3B,
    "debug": Config(dim=192, n_layers=4, n_heads=6, vocab_size=1024, multiple_of=32, max_seq_len=512),
}
"""The first is the default. `debug` has 2.2 million parameters and the shipped tokenizer's vocabulary."""
