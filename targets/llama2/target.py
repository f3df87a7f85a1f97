"""Fine-tuning LLaMA2 on instruction data, or continuing its prompts: that of `memscope profile targets/llama2`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.targets.llama2 import alpaca
from memscope.targets.llama2.alpaca import IGNORED, Batch, Sample
from memscope.targets.llama2.config import PRESETS, Config
from memscope.targets.llama2.inference import generation_workload
from memscope.targets.llama2.model import Llama, Packed
from memscope.targets.llama2.weights import load_weights, read_shape, without_initialization
from memscope.targets.training.tokenizer import Tokenizer
from memscope.workload.description import HeadLoss, StepPlan, Workload
from memscope.workload.split import split_batch

__all__ = ["PRESETS", "SHIPPED_DATA", "SHIPPED_TOKENIZER", "Config", "build", "build_on", "read_preset", "read_samples"]

SHIPPED_DATA = Path(__file__).parent / "data" / "instructions.json"
SHIPPED_TOKENIZER = Path(__file__).parent / "data" / "tokenizer.model"


def read_preset(path: Path) -> Config:
    """The default settings with the shape in a config.json or params.json, or in a folder that holds one.

    Raises:
        UsageError: the path holds no such file, or the file describes a model of another family.
    """
    return Config(**read_shape(path))


def build(config: Config) -> Workload:
    """Build the workload: fine-tuning on steps of `micro_batch * accumulation` samples with AdamW, or generation.

    Raises:
        UsageError: weights, data or tokenizer cannot be used or do not fit the model, or a sample is longer than the
            context.
    """
    samples = alpaca.longest_first(read_samples(config))
    if config.mode == "generate":
        return generation_workload(partial(_model, config), samples, config)
    return build_on(samples, config)


def build_on(samples: list[Sample], config: Config) -> Workload:
    """Build the workload on the given samples, in steps of `micro_batch * accumulation`.

    The samples keep their order, except that the first one moves to the end of the first step.

    Raises:
        UsageError: the weights cannot be used or do not fit the model.
    """

    def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

    return Workload(
        model=_model(config),
        batches=_steps(samples, config.micro_batch * config.accumulation),
        loss=loss,
        optimizer_factory=adamw,
        plan=StepPlan(micro_batches=config.accumulation),
        name="llama2",
        split=split,
        weight=target_tokens,
        settings=dataclasses.asdict(config),
        positions=config.max_seq_len,
        packed=split_packed,
        head_loss=HeadLoss("output", _head_inputs, upcast=True, ignored=IGNORED),
    )


def _model(config: Config) -> Llama:
    if config.weights is not None:
        with without_initialization():
            model = Llama(config.architecture)
        load_weights(model, config.weights)
        return model
    # Here the seed affects only the weights: the random state of the host is restored.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Llama(config.architecture)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token, over all tokens that have a label."""
    logits = _run(model, batch)
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = batch["labels"][..., 1:].contiguous()
    flat_logits = shift_logits.view(-1, shift_logits.shape[-1])
    return F.cross_entropy(flat_logits, shift_labels.view(-1), ignore_index=IGNORED)


def _run(model: nn.Module, batch: Batch, **options: bool) -> Tensor:
    if "samples" in batch:
        return model(batch["tokens"], packed=Packed(batch["positions"], batch["samples"]), **options)  # type: ignore[no-any-return]
    return model(batch["tokens"], **options)  # type: ignore[no-any-return]


def _head_inputs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The head's input `[batch, seq, dim]` and the label of each token `[batch, seq]`; the last one has none."""
    return _run(model, batch, with_head=False), F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def split(samples: list[Sample], parts: int) -> list[Batch]:
    """Split the samples of one step into micro-batches, each padded to its own longest sample."""
    return [alpaca.collate(piece) for piece in split_batch(samples, parts)]


def split_packed(samples: list[Sample], parts: int) -> list[Batch]:
    """As `split`, with the samples of each micro-batch in one row."""
    return [alpaca.pack(piece) for piece in split_batch(samples, parts)]


def target_tokens(batch: Batch) -> float:
    """Number of tokens in the mean of a micro-batch's loss: those that are predicted and have a label."""
    return float((batch["labels"][:, 1:] != IGNORED).sum())


def read_samples(config: Config) -> list[Sample]:
    """The first `samples` rows of the data as token ids, in the order of the file.

    Raises:
        UsageError: data or tokenizer cannot be used, or a sample is longer than the context; the message names the row.
    """
    path = config.tokenizer or SHIPPED_TOKENIZER
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"tokenizer {path}: its vocabulary has {tokenizer.vocab_size} tokens, but the model's (vocab_size) has "
            f"{config.vocab_size}: use another tokenizer, or --set vocab_size={tokenizer.vocab_size}"
        )
    path = config.data or SHIPPED_DATA
    samples = [alpaca.encode(row, tokenizer) for row in alpaca.load(path, config.samples)]
    if config.seq_len is not None:
        samples = [alpaca.fixed_length(sample, config.seq_len) for sample in samples]
    for row, sample in enumerate(samples):
        if len(sample.tokens) > config.max_seq_len:
            raise UsageError(
                f"data {path}, row {row}: the sample has {len(sample.tokens)} tokens, but the context (max_seq_len) is "
                f"{config.max_seq_len}: shorten the sample or leave it out, cut every sample with --set "
                f"seq_len={config.max_seq_len}, or make the context larger with --set max_seq_len={len(sample.tokens)}"
            )
    return samples


def _steps(samples: list[Sample], size: int) -> list[list[Sample]]:
    """One list of `size` samples per optimizer step; the last list is filled up from the first samples.

    The first sample, which is the longest, moves to the end of the first step. There, gradients of the others are held
    already, as for all but one sample of a step.
    """
    count = -(-len(samples) // size)
    first, *others = [[samples[(step * size + i) % len(samples)] for i in range(size)] for step in range(count)]
    return [[*first[1:], first[0]], *others]
