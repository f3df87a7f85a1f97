"""Weights in Hugging Face's format: `config.json` and safetensors, in one file or in shards with an index."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from memscope.errors import UsageError
from memscope.targets.llama2.model import Architecture
from memscope.targets.training.files import JsonFile, StoredTensor, listed, open_safetensors

__all__ = ["CONFIG", "has_weights", "hf_module", "open_weights", "read_shape", "rotary_order", "write"]

CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9

_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_RECOMPUTED = "rotary_emb.inv_freq"  # stored by transformers before 4.32


def hf_module(name: str) -> str:
    """The transformers name of a module of `Llama`: `layers.3.attention.wq` is `model.layers.3.self_attn.q_proj`."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, index, part = name.split(".", 2)
    return f"model.layers.{index}.{_IN_BLOCK[part]}"


def rotary_order(rows: Tensor, module: str, arch: Architecture, *, to_hf: bool) -> Tensor:
    """Reorder the rows `[heads * head_dim, ...]` of a query or key projection; return any other tensor unchanged.

    The rotary embedding rotates pairs of rows. Meta's format stores a pair side by side, transformers half a head
    apart (`rotate_half` in its models/llama/modeling_llama.py).
    """
    heads = {"wq": arch.n_heads, "wk": arch.kv_heads}.get(module.rpartition(".")[2])
    if heads is None:
        return rows
    pairs = (heads, -1, 2) if to_hf else (heads, 2, -1)
    ordered: Tensor = rows.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)
    return ordered


def read_shape(file: JsonFile) -> dict[str, Any]:
    """Read the fields of `Architecture` that config.json defines.

    Raises:
        UsageError: the file describes another kind of model, lacks a field, or has an invalid value.
    """
    _check_family(file)
    dim, n_heads = file.count("hidden_size"), file.count("num_attention_heads")
    if dim % n_heads:
        raise UsageError(f'{file.path}: "num_attention_heads" is {n_heads}, which does not divide "hidden_size" {dim}')
    if file.count("head_dim", dim // n_heads) * n_heads != dim:
        raise UsageError(
            f'{file.path}: "head_dim" is {file.values["head_dim"]}, expected hidden_size / num_attention_heads, '
            f"which is {dim // n_heads}"
        )
    kv_heads = file.count("num_key_value_heads", n_heads)
    shape = {
        "dim": dim,
        "n_layers": file.count("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": None if kv_heads == n_heads else kv_heads,
        "vocab_size": file.count("vocab_size"),
        # Meta's rule for the inner size, inverted: with these two, it gives exactly this size.
        "multiple_of": 1,
        "ffn_dim_multiplier": (file.count("intermediate_size") + 0.5) / int(2 * (4 * dim) / 3),
        "norm_eps": file.number("rms_norm_eps"),
        "rope_theta": _rope(file).number("rope_theta", 10_000.0),
        "rope_scaling": _rope_scaling(_rope(file)),
        "sliding_window": None,
        "tied_head": file.values.get("tie_word_embeddings") is True,
        "max_seq_len": file.count("max_position_embeddings"),
    }
    # 4096 if absent: transformers, models/mistral/configuration_mistral.py.
    if file.values["model_type"] == "mistral" and file.values.get("sliding_window", 4096) is not None:
        shape["sliding_window"] = file.count("sliding_window", 4096)
    return shape


def _check_family(file: JsonFile) -> None:
    expected = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    kind = file.values.get("model_type")
    if kind not in ("llama", "mistral"):
        raise UsageError(f'{file.path}: "model_type" is {json.dumps(kind)}, expected "llama" or "mistral"')
    for key, value in expected.items():
        if file.values.get(key, value) != value:
            raise UsageError(
                f'{file.path}: "{key}" is {json.dumps(file.values[key])}, but this target supports only '
                f"{json.dumps(value)}"
            )


def _rope(file: JsonFile) -> JsonFile:
    """The settings of the rotary embedding: one object since transformers 5, separate keys before."""
    nested = file.values.get("rope_parameters", file.values.get("rope_scaling")) or {}
    if not isinstance(nested, dict):
        raise UsageError(f"{file.path}: expected an object of RoPE parameters, found {json.dumps(nested)}")
    return JsonFile(file.path, {"rope_theta": file.values.get("rope_theta"), **nested})


def _rope_scaling(rope: JsonFile) -> tuple[float, float, float, int] | None:
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UsageError(f'{rope.path}: "rope_type" is {json.dumps(kind)}, expected "llama3" or "default"')
    return (
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.count("original_max_position_embeddings"),
    )


def _config(arch: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json for `read_shape`, with keys that transformers 4 and 5 both understand."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if arch.sliding_window is None else "MistralForCausalLM"],
        "model_type": "llama" if arch.sliding_window is None else "mistral",
        "hidden_act": "silu",
        "hidden_size": arch.dim,
        "intermediate_size": arch.hidden_dim,
        "num_hidden_layers": arch.n_layers,
        "num_attention_heads": arch.n_heads,
        "num_key_value_heads": arch.kv_heads,
        "vocab_size": arch.vocab_size,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "max_position_embeddings": arch.max_seq_len,
        "tie_word_embeddings": arch.tied_head,
        "torch_dtype": dtype,
    }
    if arch.sliding_window is not None:
        config["sliding_window"] = arch.sliding_window
    if arch.rope_scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        config["rope_scaling"] = {"rope_type": "llama3", **dict(zip(names, arch.rope_scaling, strict=True))}
    return config


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of this format, complete or not."""
    return any((folder / name).is_file() for name in (_SINGLE, _INDEX))


def open_weights(folder: Path, arch: Architecture) -> dict[str, list[StoredTensor]]:
    """Every weight by Meta's name, each in one piece. Reads only headers.

    Raises:
        UsageError: a file is missing or damaged, or lacks a tensor that the index names.
    """
    modules = [*_OUTSIDE, *(f"layers.{layer}.{part}" for layer in range(arch.n_layers) for part in _IN_BLOCK)]
    known = {f"{hf_module(module)}.weight": module for module in modules}
    stored: dict[str, list[StoredTensor]] = {}
    for name, tensor in _open_files(folder):
        module = known.get(name)
        if module is not None:
            stored[f"{module}.weight"] = [_in_metas_order(tensor, module, arch)]
        elif not name.endswith(_RECOMPUTED):
            stored[name] = [tensor]
    return stored


def _in_metas_order(tensor: StoredTensor, module: str, arch: Architecture) -> StoredTensor:
    return dataclasses.replace(tensor, read=lambda: rotary_order(tensor.read(), module, arch, to_hf=False))


def _open_files(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    if (folder / _SINGLE).is_file():
        yield from open_safetensors(folder / _SINGLE).items()
        return
    if not (folder / _INDEX).is_file():
        raise UsageError(f"weights {folder}: neither {_SINGLE} nor {_INDEX} next to {CONFIG}{_other_files(folder)}")
    names = _index(folder / _INDEX)
    missing = {file for file in names.values() if not (folder / file).is_file()}
    if missing:
        raise UsageError(
            f"weights {folder}: shard {listed(missing)} is missing; {_INDEX} names {len({*names.values()})} shards"
        )
    shards = {file: open_safetensors(folder / file) for file in sorted({*names.values()})}
    absent = {name for name, file in names.items() if name not in shards[file]}
    if absent:
        raise UsageError(f"{folder / _INDEX}: names tensors that their files lack: {listed(absent)}")
    yield from ((name, shards[file][name]) for name, file in names.items())


def _other_files(folder: Path) -> str:
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file() or pickled.with_name(f"{pickled.name}.index.json").is_file():
        return "; pytorch_model.bin is not supported: convert it with transformers' save_pretrained"
    return ""


def _index(path: Path) -> dict[str, str]:
    names = JsonFile.read(path).values.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UsageError(f'{path}: expected "weight_map", an object from tensor names to file names')
    elsewhere = {file for file in names.values() if Path(file).name != file}
    if elsewhere:
        raise UsageError(f"{path}: names files outside its folder: {listed(elsewhere)}")
    return names


def write(weights: Mapping[str, Tensor], arch: Architecture, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write config.json and the weights: one file, or files of about `shard_bytes` with an index.

    A tied head is not written, as in transformers.
    """
    dtype = str(weights["norm.weight"].dtype).removeprefix("torch.")
    (folder / CONFIG).write_text(json.dumps(_config(arch, dtype), indent=2) + "\n", encoding="utf-8")
    kept = {name: tensor for name, tensor in weights.items() if not (arch.tied_head and name == "output.weight")}
    shards = _shards(kept, shard_bytes)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {f"{hf_module(module)}.weight": _in_hf_order(kept, module, arch) for module in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in kept.values())}, "weight_map": files}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_hf_order(weights: Mapping[str, Tensor], module: str, arch: Architecture) -> Tensor:
    return rotary_order(weights[f"{module}.weight"].cpu(), module, arch, to_hf=True).contiguous()


def _shards(weights: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Modules in order, grouped into shards of at most `shard_bytes`; a larger module has a shard to itself."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in weights.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        room -= tensor.nbytes
        shards[-1].append(name.removesuffix(".weight"))
    return shards
