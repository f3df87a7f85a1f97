"""Random inputs for a model: token ids, pixels or sound, with labels of the right form."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.targets.hf.images import image_text_sample, pixels
from memscope.targets.hf.lengths import SampleLength, fitting_length
from memscope.targets.hf.program import Program
from memscope.workload.split import split_batch

__all__ = ["Inputs", "inputs_for"]

_Tensors = Mapping[str, Tensor]
"""A sample; the first dimension of every tensor is joined when samples make a micro-batch."""


@dataclass(frozen=True)
class Inputs:
    """Makes the micro-batches of a step."""

    sample: Callable[[], _Tensors]
    """Makes a sample, on the host."""
    packed: bool
    """Whether a micro-batch is one row."""
    dtype: torch.dtype
    """Of pixels and sound: that of the weights, as a program must convert them where the model does not."""
    padding: int = 0
    """Tokens of padding in every row but the first."""
    length: SampleLength | None = None
    """How long the samples are; None: `seq_len` has no effect on them."""

    def split(self, samples: list[int], parts: int) -> list[dict[str, Tensor]]:
        """Micro-batches on the host, for the numbered samples of a step."""
        return [self._batch(len(piece)) for piece in split_batch(samples, parts)]

    def split_packed(self, samples: list[int], parts: int) -> list[dict[str, Tensor]]:
        """As `split`, with the samples of each micro-batch in one row, without the padding."""
        return [self._row(len(piece)) for piece in split_batch(samples, parts)]

    def _batch(self, count: int) -> dict[str, Tensor]:
        if self.packed:
            return self._row(count)
        made = [self.sample() for _ in range(count)]
        joined = {key: torch.cat([one[key] for one in made]) for key in made[0]}
        return self._padded({k: one.to(self.dtype) if one.is_floating_point() else one for k, one in joined.items()})

    def _row(self, count: int) -> dict[str, Tensor]:
        """Samples joined to one row; all but the first are shorter by the padding."""
        made = [self.sample() for _ in range(count)]
        lengths = [one["input_ids"].shape[1] - (self.padding if index else 0) for index, one in enumerate(made)]
        rows = {
            key: torch.cat([one[key][:, :length] for one, length in zip(made, lengths, strict=True)], 1)
            for key in ("input_ids", "labels")
        }
        # The first token of a sample is no target, as in DataCollatorWithFlattening of transformers.
        rows["labels"][0, list(itertools.accumulate(lengths, initial=0))[:-1]] = -100
        return {**rows, "position_ids": torch.cat([*map(torch.arange, lengths)]).unsqueeze(0)}

    def _padded(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The micro-batch with padding on the right in all rows but the first."""
        if self.padding:
            batch["attention_mask"][1:, -self.padding :] = 0
        return batch


def inputs_for(model: nn.Module, config: Any, program: Program, task: str) -> Inputs:
    """Inputs of the kind that the model is trained on.

    Raises:
        UsageError: memscope does not know the kind, or the model has fewer positions than `seq_len`.
    """
    if program.packing and task != "causal-lm":
        raise UsageError(f"hf: packing=true is for language models (causal-lm), and the task is {task}")
    made = _Maker(model, config, program, torch.Generator(device="cpu").manual_seed(0))
    sample, length = made.of(task)
    if program.padding:
        _require_room(sample(), program.padding, task)
    return Inputs(sample, program.packing, model.dtype, program.padding, length)  # type: ignore[arg-type]


def _require_room(sample: _Tensors, padding: int, task: str) -> None:
    mask = sample.get("attention_mask")
    if mask is None:
        raise UsageError(f"hf: padding={padding} is for samples with an attention mask, and those of {task} have none")
    if padding >= mask.shape[1]:
        raise UsageError(f"hf: padding={padding}: a sample has {mask.shape[1]} tokens: choose fewer")


@dataclass(frozen=True)
class _Maker:
    model: nn.Module
    config: Any
    program: Program
    generator: torch.Generator

    def of(self, task: str) -> tuple[Callable[[], _Tensors], SampleLength | None]:
        config, program = self.config, self.program
        if task in ("causal-lm", "masked-lm", "sequence-classification", "token-classification", "question-answering"):
            length = fitting_length(self.model, config.get_text_config(), program.seq_len, program.model)
            return partial(self._text, task, length.tokens), length
        if task == "seq2seq":
            length = fitting_length(self.model, config, program.seq_len, program.model)
            return partial(self._pairs, length.tokens, self._target_length()), length
        if task == "image-classification":
            return self._images, None
        if task == "speech-seq2seq":
            return self._speech, None
        if task == "ctc":
            return self._sound, None
        length = fitting_length(self.model, config.get_text_config(), program.seq_len, program.model)
        ids = partial(self._ids, config.get_text_config())
        accepted = inspect.signature(self.model.forward).parameters
        image = partial(image_text_sample, config, length.tokens, program.image_size, ids, accepted)
        image()  # tells at once what cannot be made
        return image, length

    def _target_length(self) -> int:
        most = getattr(self.config, "max_target_positions", None) or getattr(
            self.config, "max_position_embeddings", None
        )
        wanted = self.program.target_len
        if wanted is not None and most is not None and wanted > most:
            raise UsageError(f"hf: target_len={wanted}: the decoder of {self.program.model} has {most} positions")
        return wanted or min(128, most or 128)

    def _text(self, task: str, length: int) -> _Tensors:
        ids = self._ids(self.config.get_text_config(), length)
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if task in ("causal-lm", "masked-lm"):
            return {**sample, "labels": ids.clone()}
        if task == "question-answering":
            return {**sample, "start_positions": self._below(length, 1), "end_positions": self._below(length, 1)}
        shape = (1, length) if task == "token-classification" else (1,)
        return {**sample, "labels": self._below(self.config.num_labels, *shape)}

    def _pairs(self, source: int, target: int) -> _Tensors:
        ids = self._ids(self.config, source)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self._ids(self.config, target)}

    def _images(self) -> _Tensors:
        return {
            "pixel_values": pixels(self.config, self.program.image_size),
            "labels": self._below(self.config.num_labels, 1),
        }

    def _speech(self) -> _Tensors:
        """Thirty seconds of Whisper's spectrogram: two frames become a position."""
        config = self.config
        if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions"):
            raise UsageError(f"hf: the features that a {config.model_type} model hears are not known: write a target")
        features = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": features, "labels": self._ids(config, self._target_length())}

    def _sound(self) -> _Tensors:
        """Ten seconds at 16 kHz."""
        return {
            "input_values": torch.zeros(1, 160_000),
            "labels": self._ids(self.config, self.program.target_len or 128),
        }

    def _ids(self, config: Any, length: int) -> Tensor:
        """Token ids `[1, length]`, none of them a special token of the configuration."""
        ids = self._below(config.vocab_size, 1, length)
        special = _special_ids(self.config) | _special_ids(config)
        free = next((token for token in range(config.vocab_size) if token not in special), 0)
        for token in special:
            ids[ids == token] = free
        return ids

    def _below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator, device="cpu")


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            found |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    return found
