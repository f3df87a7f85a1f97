"""Instruction data in Alpaca's format: from a JSON file to padded tensors with the prompt masked out of the labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from memscope.errors import UsageError
from memscope.targets.training.tokenizer import Tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "Instruction",
    "Sample",
    "collate",
    "encode",
    "fixed_length",
    "load",
    "longest_first",
    "pack",
]

IGNORED = -100
"""Label of a token without a loss: `ignore_index` of `torch.nn.functional.cross_entropy`."""
_PAD_ID = 0
"""Pads short samples on the right. Any id would do: see `collate`."""

# Wording and order: Stanford Alpaca, train.py, PROMPT_DICT.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Instruction:
    """One row of the data."""

    instruction: str
    input: str
    """Context for the instruction; empty if it needs none."""
    output: str
    """The response to learn."""

    @property
    def prompt(self) -> str:
        """The prompt: the template with or without input, filled in."""
        template = _WITH_INPUT if self.input else _WITHOUT_INPUT
        return template.format(instruction=self.instruction, input=self.input)


_FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class Sample:
    """One sample as token ids: BOS, prompt, response, EOS."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    """Number of leading tokens, BOS included, that are the prompt and have no loss."""

    @property
    def labels(self) -> tuple[int, ...]:
        """The tokens, with `IGNORED` in place of the prompt."""
        return (IGNORED,) * self.prompt_tokens + self.tokens[self.prompt_tokens :]


class Batch(TypedDict):
    """A micro-batch: int64 tensors `[batch, seq]` in host memory."""

    tokens: Tensor
    labels: Tensor
    positions: NotRequired[Tensor]
    """Of packed samples: the position of each token in its own sample, `[1, seq]`."""
    samples: NotRequired[Tensor]
    """Of packed samples: the number of the sample of each token, `[1, seq]`."""


def load(path: str | Path, limit: int) -> list[Instruction]:
    """Read the first `limit` rows of a JSON list of objects with `instruction`, `input` and `output`.

    Raises:
        UsageError: the file is missing, is not JSON, or is not a list, or the list is empty; or a row lacks a field,
            has a field that is not text, or has an empty instruction or output. Rows are counted from 0.
    """
    rows = _json_list(Path(path))
    return [_instruction(f"data {path}, row {index}", row) for index, row in enumerate(rows[:limit])]


def _json_list(path: Path) -> list[Any]:
    wanted = 'expected a JSON list of {"instruction": …, "input": …, "output": …}; choose a file with --set data=PATH'
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"data {path}: no such file; {wanted}") from None
    except OSError as error:
        raise UsageError(f"data {path}: cannot be read ({error.strerror or error}); {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"data {path}: not JSON ({error}); {wanted}") from None
    if not isinstance(rows, list):
        raise UsageError(f"data {path}: holds a JSON {_json_type(rows)}; {wanted}")
    if not rows:
        raise UsageError(f"data {path}: the list is empty, so there is nothing to train on; {wanted}")
    return rows


def _instruction(where: str, row: Any) -> Instruction:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a JSON {_json_type(row)}, expected an object with {', '.join(_FIELDS)}")
    for name in _FIELDS:
        if name not in row:
            raise UsageError(
                f'{where}: missing field "{name}"; the row has {", ".join(row) or "no fields"}: '
                f"add the field{' (empty text for no input)' if name == 'input' else ''} or remove the row"
            )
        if not isinstance(row[name], str):
            raise UsageError(f'{where}: "{name}" is a JSON {_json_type(row[name])}, expected text')
    for name in ("instruction", "output"):
        if not row[name].strip():
            raise UsageError(f'{where}: "{name}" is empty, so there is nothing to learn: fill it in or remove the row')
    return Instruction(row["instruction"], row["input"], row["output"])


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


def encode(instruction: Instruction, tokenizer: Tokenizer) -> Sample:
    """Encode BOS, prompt, response and EOS as one text, as Stanford Alpaca does.

    The mask covers BOS and as many tokens as the prompt alone has. If the response begins with punctuation, its first
    token may include the colon that ends the prompt (":-" is one piece of LLaMA2's tokenizer); that token counts as
    prompt.
    """
    prompt = instruction.prompt
    ids = tokenizer.encode(prompt + instruction.output)
    return Sample((tokenizer.bos_id, *ids, tokenizer.eos_id), 1 + len(tokenizer.encode(prompt)))


def fixed_length(sample: Sample, seq_len: int) -> Sample:
    """Repeat or cut a sample to exactly `seq_len` tokens, all of them targets: for measurements of one shape."""
    repeats = -(-seq_len // len(sample.tokens))
    return Sample((sample.tokens * repeats)[:seq_len], 0)


def longest_first(samples: Sequence[Sample]) -> list[Sample]:
    """Move the (first) longest sample, which decides the peak, to the front; the others keep their order."""
    longest = max(range(len(samples)), key=lambda index: len(samples[index].tokens))
    return [samples[longest], *samples[:longest], *samples[longest + 1 :]]


def collate(samples: Sequence[Sample]) -> Batch:
    """Combine samples of different lengths into one micro-batch, padded on the right to the longest.

    No padding mask is needed: attention is causal, so no token sees the padding after it, and padding has no label.
    """
    seq_len = max(len(sample.tokens) for sample in samples)
    tokens = [sample.tokens + (_PAD_ID,) * (seq_len - len(sample.tokens)) for sample in samples]
    labels = [sample.labels + (IGNORED,) * (seq_len - len(sample.tokens)) for sample in samples]
    return Batch(tokens=torch.tensor(tokens, dtype=torch.int64), labels=torch.tensor(labels, dtype=torch.int64))


def pack(samples: Sequence[Sample]) -> Batch:
    """Join samples to one row without padding. The first token of each is no target: none of its own is before it."""
    rows = {
        "tokens": [token for sample in samples for token in sample.tokens],
        "labels": [label for sample in samples for label in (IGNORED, *sample.labels[1:])],
        "positions": [position for sample in samples for position in range(len(sample.tokens))],
        "samples": [number for number, sample in enumerate(samples) for _ in sample.tokens],
    }
    batch: Any = {name: torch.tensor([row], dtype=torch.int64) for name, row in rows.items()}
    return batch  # type: ignore[no-any-return]
