"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT's base model comes from transformers. This module translates between its names and row order of q and k, and ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from memscope.errors import UsageError
from memscope.strategies.lora import LoRALinear, adapt, adapted_layers
from memscope.targets.llama2.hf_format import hf_module, rotary_order
from memscope.targets.llama2.model import Llama
from memscope.targets.training.files import JsonFile, StoredTensor, listed, new_folder, open_safetensors

__all__ = ["load_adapter", "save_adapter"]

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

# Settings of peft.LoraConfig (peft 0.21, tuners/lora/config.py) that change what an adapter computes, and the values
# for which an adapter computes the same as `LoRALinear`. Other initializations also change the model's own weights.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}


@dataclass(frozen=True)
class _Settings:
    r: int
    alpha: float
    dropout: float


def save_adapter(model: Llama, path: str | Path) -> None:
    """Write the model's LoRA updates to a new folder in PEFT's format. The folder appears only when it is complete.

    Raises:
        UsageError: the folder exists, or the model has no LoRA updates, or others than plain ones.
        MemscopeError: the disk is full or cannot be written.
    """
    layers = adapted_layers(model)
    if not layers:
        raise UsageError(f"{path}: the model has no LoRA updates to save: apply the lora strategy first")
    if any(layer.magnitude is not None or layer.start != "gaussian" for layer in layers.values()):
        raise UsageError(f"{path}: only plain LoRA updates can be saved: train without dora, pissa and olora")
    tensors = {}
    for name, layer in layers.items():
        module = _PREFIX + hf_module(name)
        tensors[module + _A] = layer.lora_a.detach().cpu().contiguous()
        tensors[module + _B] = rotary_order(layer.lora_b.detach().cpu(), name, model.arch, to_hf=True).contiguous()
    with new_folder(Path(path)) as folder:
        (folder / _CONFIG).write_text(json.dumps(_config(model, layers), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})


def load_adapter(model: Llama, path: str | Path) -> None:
    """Load LoRA updates from a folder into the model, converted to its dtype and moved to its device.

    A model without updates is frozen and adapted, with the dropout of the file. A model that the `lora` strategy has
    adapted must have updates on the same modules, with the same rank and scaling; it keeps its dropout.

    Raises:
        UsageError: a file is missing or damaged, or the adapter is not plain LoRA, does not fit the model, or differs
            from the updates that the model has. The model is unchanged.
    """
    folder = Path(path)
    settings = _read_settings(folder)
    stored = _open(folder, model, settings)
    layers = adapted_layers(model)
    if not layers:
        adapt(model, stored, r=settings.r, alpha=settings.alpha, dropout=settings.dropout)
        layers = adapted_layers(model)
    _check_same(folder, layers, set(stored), settings)
    with torch.no_grad():
        for name, (a, b) in stored.items():
            layers[name].lora_a.copy_(a.read())
            layers[name].lora_b.copy_(rotary_order(b.read(), name, model.arch, to_hf=False))


def _settings(layer: LoRALinear) -> _Settings:
    r = layer.lora_a.shape[0]
    alpha = float(f"{layer.scaling * r:.12g}")  # alpha / r * r may differ from alpha in the last bit: 1 / 49 * 49 < 1
    return _Settings(r, alpha, layer.dropout.p)


def _config(model: Llama, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    settings, *others = {_settings(layer) for layer in layers.values()}
    assert not others, "the lora strategy gives every module the same rank, scaling and dropout"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": settings.r,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "bias": "none",
        "target_modules": _target_modules(model, layers),
        "inference_mode": True,
    }


def _target_modules(model: Llama, layers: dict[str, LoRALinear]) -> list[str]:
    """Last parts of names, as PEFT's users write them; full names if not all modules of that name are adapted."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    last = {name.rpartition(".")[2] for name in layers}
    whole = {name for name in linear if name.rpartition(".")[2] in last} == layers.keys()
    names = [hf_module(name) for name in layers]
    return sorted({name.rpartition(".")[2] for name in names} if whole else names)


def _read_settings(folder: Path) -> _Settings:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UsageError(f"adapter {folder}: {what}; expected a folder with {_CONFIG} and {_TENSORS}")
    file = JsonFile.read(folder / _CONFIG)
    if file.values.get("peft_type") != "LORA":
        raise UsageError(f'{file.path}: "peft_type" is {json.dumps(file.values.get("peft_type"))}, expected "LORA"')
    for key, plain in _PLAIN.items():
        value = file.values.get(key, plain[0])
        if value not in plain:
            raise UsageError(
                f'{file.path}: "{key}" is {json.dumps(value)}, expected {json.dumps(plain[0])}: '
                "only plain LoRA can be loaded"
            )
    dropout = file.values.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UsageError(f'{file.path}: "lora_dropout" is {json.dumps(dropout)}, expected a number from 0 and below 1')
    return _Settings(file.count("r"), file.number("lora_alpha"), float(dropout))


def _open(folder: Path, model: Llama, settings: _Settings) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """A and B of each adapted module, by its name; their shapes and dtypes are checked."""
    tensors = open_safetensors(folder / _TENSORS)
    found: dict[str, tuple[StoredTensor, StoredTensor]] = {}
    for name, module in model.named_modules():
        key = _PREFIX + hf_module(name) if isinstance(module, nn.Linear) else ""
        if key + _A in tensors and key + _B in tensors:
            found[name] = tensors.pop(key + _A), tensors.pop(key + _B)
            _check_shapes(folder, *found[name], module, settings.r)
    if tensors:
        raise UsageError(f"{folder / _TENSORS}: the model has no module for {listed(tensors)}")
    if not found:
        raise UsageError(f"{folder / _TENSORS}: the file holds no tensors")
    return found


def _check_shapes(folder: Path, a: StoredTensor, b: StoredTensor, module: nn.Module, r: int) -> None:
    assert isinstance(module, nn.Linear)
    for tensor, shape in ((a, (r, module.in_features)), (b, (module.out_features, r))):
        if tensor.shape != shape:
            raise UsageError(
                f"adapter {folder}: {tensor.place} has shape {list(tensor.shape)}, expected {list(shape)} "
                f"(rank {r}, linear layer with {module.in_features} inputs and {module.out_features} outputs)"
            )
        if isinstance(tensor.dtype, str):
            raise UsageError(f"adapter {folder}: {tensor.place} has dtype {tensor.dtype}, expected floating point")


def _check_same(folder: Path, layers: dict[str, LoRALinear], found: set[str], settings: _Settings) -> None:
    differing = layers.keys() ^ found
    if differing:
        raise UsageError(f"adapter {folder}: adapted only in the model or only in the file: {listed(differing)}")
    for name, layer in layers.items():
        if layer.merged:
            raise UsageError(f"adapter {folder}: the update of {name} is merged into the weight: unmerge it first")
        has = _settings(layer)
        if (has.r, has.alpha) != (settings.r, settings.alpha):
            raise UsageError(
                f"adapter {folder}: r={settings.r}, alpha={settings.alpha} in the file, "
                f"r={has.r}, alpha={has.alpha} in the model ({name})"
            )
