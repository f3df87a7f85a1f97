"""The settings of `targets/gpt`: the model, its text and its training step. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from memscope.errors import UsageError, nearest

__all__ = ["PRESETS", "Config"]

_CHOICES = {
    "style": ("gpt", "llama"),
    "attention": ("eager", "sdpa"),
    "residual": ("plain", "all"),
    "routing": ("expert", "token"),
}
_COUNTS = (
    "dim", "n_layers", "n_heads", "vocab_size", "seq_len", "experts", "experts_per_token", "samples", "micro_batch",
    "accumulation",
)  # fmt: skip


@dataclass(frozen=True)
class GptConfig:
    """The model, its text and its training step. The defaults are a GPT of 166 million parameters.

    Raises:
        UsageError: a value is invalid; the message lists every problem.
    """

    style: str = "gpt"
    """gpt: LayerNorm, learned positions and GELU; llama: RMSNorm, rotary positions and SwiGLU. No linear layer has a
    bias."""
    dim: int = 768
    """Size of the residual stream."""
    n_layers: int = 18
    """Number of transformer layers."""
    n_heads: int = 12
    """Number of heads; dim / n_heads is the size of a head."""
    vocab_size: int = 50_304
    """Rows of the embedding, which is also the output head."""
    seq_len: int = 512
    """Tokens of a sample, and positions of the model."""
    dropout: float = 0.1
    """Probability of dropout: of embeddings, attention, and both results of a layer."""
    attention: str = "sdpa"
    """eager: scores, mask and softmax as single operations; sdpa: scaled_dot_product_attention."""
    residual: str = "plain"
    """plain: a layer gets the sum of all results before it; all: a weighted sum of what every layer gave, with trained
    weights."""
    experts: int | None = None
    """Number of feed-forward experts in each layer; none: one feed-forward for all tokens."""
    routing: str = "expert"
    """expert: each expert chooses its tokens; token: each token chooses its experts."""
    experts_per_token: int = 2
    """Experts that a token has on average (routing=expert), or at most (routing=token)."""
    data: str | None = None
    """Text file in UTF-8; none: token ids made up for measuring memory and time."""
    tokenizer: str | None = None
    """SentencePiece model file; none: each byte is a token."""
    samples: int | None = None
    """Number of samples to train on, from the start of the text; none: all but those held out."""
    micro_batch: int = 66
    """Samples per micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    lr: float = 6e-4
    """Learning rate of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    seed: int = 0
    """Seed of the weights, the order of samples and dropout."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise UsageError("targets/gpt cannot be built:\n" + "\n".join(f"  {problem}" for problem in problems))


def _problems(config: GptConfig) -> Iterator[str]:
    counts = {name: getattr(config, name) for name in _COUNTS if getattr(config, name) is not None}
    bad = {name for name, value in counts.items() if value < 1}
    for name in (name for name in counts if name in bad):
        yield f"{name}={counts[name]}: expected a whole number from 1"
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            yield f'{name}="{getattr(config, name)}": {nearest(getattr(config, name), choices)}'
    if not 0 <= config.dropout < 1:
        yield f"dropout={config.dropout}: expected 0 or more, below 1"
    for name in ("lr", "weight_decay"):
        if not getattr(config, name) >= 0:
            yield f"{name}={getattr(config, name)}: expected 0 or more"
    if not bad & {"dim", "n_heads"} and config.dim % (2 * config.n_heads):
        yield f"dim={config.dim} with n_heads={config.n_heads}: dim must be a multiple of {2 * config.n_heads}"
    if config.experts is not None and not bad and config.experts_per_token > config.experts:
        yield f"experts_per_token={config.experts_per_token}: expected at most experts={config.experts}"


Config: TypeAlias = GptConfig
"""The name by which memscope finds the settings of a target."""

PRESETS = {
    "166m": Config(),
    "209m": Config(n_layers=24),
    "llama-166m": Config(style="llama"),
    "debug": replace(Config(), dim=64, n_layers=2, n_heads=2, vocab_size=256, seq_len=32, micro_batch=4),
}
"""The first is the default. `debug` has 0.1 million parameters and reads bytes."""
