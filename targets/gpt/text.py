"""Text as windows of token ids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from memscope.errors import UsageError
from memscope.targets.gpt.config import Config
from memscope.targets.training.tokenizer import Tokenizer

__all__ = ["made_up", "read_windows"]


def made_up(config: Config, samples: int) -> Tensor:
    """Windows `[samples, seq_len + 1]` of token ids without a meaning."""
    count = samples * (config.seq_len + 1)
    return torch.arange(count).remainder(config.vocab_size).view(samples, config.seq_len + 1)


def read_windows(config: Config) -> Tensor:
    """The text as windows `[samples, seq_len + 1]`; the last token of a window is the first of the next one.

    Raises:
        UsageError: the text cannot be read, is empty or too short for one window; or its tokens do not fit the model.
    """
    assert config.data is not None, "without a text, token ids are made up"
    path = Path(config.data)
    wanted = "expected a text file in UTF-8; choose one with --data FILE"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"data {path}: no such file; {wanted}") from None
    except OSError as error:
        raise UsageError(f"data {path}: cannot be read ({error.strerror or error}); {wanted}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"data {path}: byte {error.start} is not UTF-8; {wanted}") from None
    if not text.strip():
        raise UsageError(f"data {path}: the text is empty, so there is nothing to train on; {wanted}")
    tokens = _tokens(text, config)
    count = (len(tokens) - 1) // config.seq_len
    if count < 1:
        raise UsageError(
            f"data {path}: the text has {len(tokens)} tokens, but a sample takes {config.seq_len + 1} (seq_len and the "
            f"token after it): use a longer text, or --set seq_len={max(len(tokens) - 1, 1)}"
        )
    return tokens[: count * config.seq_len + 1].unfold(0, config.seq_len + 1, config.seq_len)


def _tokens(text: str, config: Config) -> Tensor:
    if config.tokenizer is None:
        size, of = 256, "bytes"
        tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
        size, of = tokenizer.vocab_size, f"tokenizer {config.tokenizer}"
        tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    if size > config.vocab_size:
        raise UsageError(
            f"{of}: the vocabulary has {size} tokens, but the model's (vocab_size) has {config.vocab_size}: "
            f"--set vocab_size={size}"
        )
    return tokens
