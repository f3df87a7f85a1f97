"""Weights in Meta's format: `params.json` and one `consolidated.NN.pth` for each model-parallel rank."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memscope.errors import UsageError
from memscope.targets.llama2.model import Architecture
from memscope.targets.training.files import JsonFile, StoredTensor, listed

__all__ = ["CONFIG", "has_weights", "open_weights", "read_shape", "write"]

CONFIG = "params.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_RECOMPUTED = "rope.freqs"  # stored by Meta's code; every reader computes it anew

# Default of LLaMA2's code if params.json has none (facebookresearch/llama, llama/model.py); LLaMA 3's files have it.
_ROPE_THETA = 10_000.0
# The values that `use_scaled_rope` implies (meta-llama/llama-models, models/llama3/model.py). `rope_scaling_factor`, as
# in models/llama4/args.py, may replace the first.
_ROPE_SCALING = (8.0, 1.0, 4.0, 8192)


def read_shape(file: JsonFile) -> dict[str, Any]:
    """Read the fields of `Architecture` that params.json defines.

    Raises:
        UsageError: a field is missing or has an invalid value.
    """
    shape: dict[str, Any] = {
        "dim": file.count("dim"),
        "n_layers": file.count("n_layers"),
        "n_heads": file.count("n_heads"),
        "n_kv_heads": file.count("n_kv_heads", file.count("n_heads")),
        "multiple_of": file.count("multiple_of"),
        "ffn_dim_multiplier": None,
        "norm_eps": file.number("norm_eps"),
        "rope_theta": file.number("rope_theta", _ROPE_THETA),
        "rope_scaling": None,
        "sliding_window": None,
    }
    if file.values.get("vocab_size") != -1:  # -1 in LLaMA2's files: the tokenizer's size
        shape["vocab_size"] = file.count("vocab_size")
    if file.values.get("ffn_dim_multiplier") is not None:
        shape["ffn_dim_multiplier"] = file.number("ffn_dim_multiplier")
    if file.values.get("use_scaled_rope"):
        shape["rope_scaling"] = (file.number("rope_scaling_factor", _ROPE_SCALING[0]), *_ROPE_SCALING[1:])
    if file.values.get("sliding_window") is not None:
        shape["sliding_window"] = file.count("sliding_window")
    return shape


def _params(arch: Architecture) -> dict[str, Any]:
    """The params.json for `read_shape`. Defaults are left out, because LLaMA2's code refuses keys it does not know.

    Raises:
        UsageError: params.json cannot express how the rotary embedding is scaled.
    """
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
    params: dict[str, Any] = {name: getattr(arch, name) for name in (*names, "sliding_window")}
    if arch.rope_theta != _ROPE_THETA:
        params["rope_theta"] = arch.rope_theta
    if arch.rope_scaling is not None:
        if arch.rope_scaling[1:] != _ROPE_SCALING[1:]:
            raise UsageError(
                f"rope_scaling={arch.rope_scaling} cannot be saved in Meta's format, which allows only "
                f"{_ROPE_SCALING[1:]} after the first factor: save in Hugging Face's format"
            )
        params["use_scaled_rope"] = True
        if arch.rope_scaling != _ROPE_SCALING:
            params["rope_scaling_factor"] = arch.rope_scaling[0]
    return {name: value for name, value in params.items() if value is not None}


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of this format, complete or not."""
    return any(folder.glob("consolidated.*.pth"))


def open_weights(folder: Path, arch: Architecture) -> dict[str, list[StoredTensor]]:
    """Every weight's pieces, one per shard, in shard order. Reads names and shapes; the data is mapped, not read.

    Raises:
        UsageError: a shard is missing or damaged, holds anything but tensors, or has other names than the first.
    """
    shards = [_open_shard(path) for path in _shard_files(folder)]
    for path, shard in zip(_shard_files(folder), shards, strict=True):
        differing = shard.keys() ^ shards[0].keys()
        if differing:
            raise UsageError(
                f"{path}: not of the same model as the first shard: only one of them has {listed(differing)}"
            )
    return {name: [shard[name] for shard in shards] for name in shards[0] if name != _RECOMPUTED}


def _shard_files(folder: Path) -> list[Path]:
    found = {int(match[1]): path for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    if not found:
        raise UsageError(f"weights {folder}: no consolidated.00.pth next to {CONFIG}")
    missing = sorted(set(range(max(found))) - found.keys())
    if missing:
        names = listed(f"consolidated.{index:02}.pth" for index in missing)
        raise UsageError(f"weights {folder}: shard {names} is missing; found {len(found)}, up to {max(found):02}")
    return [found[index] for index in sorted(found)]


def _open_shard(path: Path) -> dict[str, StoredTensor]:
    try:
        held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest of PyTorch's message tells how to run it anyway
        what = f"the file names {named[1]}, which may be code" if named else "not a pickle of tensors"
        raise UsageError(f"{path}: {what}: refused, and nothing in it was run. Expected tensors by name") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UsageError(
            f"{path}: truncated, or not weights written by torch.save ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(held, Mapping) or not all(_is_plain(tensor) for tensor in held.values()):
        raise UsageError(f"{path}: expected tensors by name and nothing else, as in Meta's consolidated.00.pth")
    return {str(name): _stored(str(name), tensor, path) for name, tensor in held.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _stored(name: str, tensor: Tensor, path: Path) -> StoredTensor:
    return StoredTensor(f"{name} in {path.name}", tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write(weights: Mapping[str, Tensor], arch: Architecture, folder: Path) -> None:
    """Write params.json and one shard.

    Raises:
        UsageError: params.json cannot express the architecture.
    """
    (folder / CONFIG).write_text(json.dumps(_params(arch), indent=2) + "\n", encoding="utf-8")
    torch.save(dict(weights), folder / "consolidated.00.pth")
