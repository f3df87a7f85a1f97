"""Small LLaMA2 models with random weights, and folders of weights made from them."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import Config
from memscope.targets.llama2.weights import save_weights

__all__ = ["FORMATS", "SMALL", "TIED", "Format", "files_no_larger_than", "model_of", "same", "saved", "split_by_rank"]

SMALL = Config(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=1024, multiple_of=8, max_seq_len=512, samples=8)
TIED = dataclasses.replace(SMALL, tied_head=True)

Format = Literal["huggingface", "meta"]
FORMATS: list[Format] = ["huggingface", "meta"]


def model_of(config: Config = SMALL, seed: int = 0) -> Llama:
    """A model whose weights, norms included, are all random and large enough to make any change visible."""
    torch.manual_seed(seed)
    model = Llama(config.architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    return model


def same(one: Llama, other: Llama) -> bool:
    """Whether every weight is equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def saved(path: Path, format: Format, config: Config = SMALL) -> Path:
    """A folder with the weights of `model_of(config)`."""
    save_weights(model_of(config), path, format)
    return path


def split_by_rank(folder: Path, shards: int, *, embedding: int = 1) -> Path:
    """Split one file into model-parallel shards: column-parallel layers by rows, row-parallel ones by columns.

    Source: ColumnParallelLinear, RowParallelLinear and ParallelEmbedding in facebookresearch/llama, llama/model.py;
    LLaMA 3's VocabParallelEmbedding is split by rows (`embedding=0`).
    """
    dims = dict.fromkeys(["wq", "wk", "wv", "w1", "w3", "output"], 0) | {"wo": 1, "w2": 1, "tok_embeddings": embedding}
    whole = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for shard in range(shards):
        piece = {"rope.freqs": torch.ones(4)}
        for name, tensor in whole.items():
            dim = dims.get(name.split(".")[-2])
            piece[name] = tensor if dim is None else tensor.chunk(shards, dim)[shard].clone()
        torch.save(piece, folder / f"consolidated.{shard:02}.pth")
    return folder


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """Let writing beyond this file size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
