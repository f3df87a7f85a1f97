"""Reading and writing the model's weights, in Meta's and Hugging Face's formats."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode

from memscope.errors import UsageError
from memscope.strategies.lora import LoRALinear
from memscope.targets.llama2 import hf_format, meta_format
from memscope.targets.llama2.model import Architecture, Llama
from memscope.targets.training.files import JsonFile, StoredTensor, listed, new_folder
from memscope.targets.training.tokenizer import TOKENIZER
from memscope.workload.settings import format_value

__all__ = ["load_weights", "read_shape", "save_weights", "without_initialization"]

_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_HEAD, _EMBEDDING = "output.weight", "tok_embeddings.weight"


def read_shape(path: str | Path) -> dict[str, Any]:
    """Read the shape of a model, as fields of `Architecture`, from Meta's params.json or Hugging Face's config.json.

    Args:
        path: one of the two files, or a folder that holds one.

    Raises:
        UsageError: neither file is there, or it describes a model of another family.
    """
    path = Path(path)
    file = JsonFile.read(path / _format(path).CONFIG if path.is_dir() else path)
    return meta_format.read_shape(file) if "dim" in file.values else hf_format.read_shape(file)


def _format(folder: Path) -> ModuleType:
    if not folder.is_dir():
        raise UsageError(f"weights {folder}: {'is a file' if folder.exists() else 'no such folder'}; {_EXPECTED}")
    described = [form for form in (hf_format, meta_format) if (folder / form.CONFIG).is_file()]
    if not described:
        raise UsageError(f"weights {folder}: neither {hf_format.CONFIG} nor {meta_format.CONFIG} found; {_EXPECTED}")
    return next((form for form in described if form.has_weights(folder)), described[0])


_EXPECTED = "expected a folder with config.json and model.safetensors, or with params.json and consolidated.00.pth"


def load_weights(model: Llama, path: str | Path) -> None:
    """Fill the model with the weights in a folder, converted to its dtype and moved to its device.

    Files are mapped and read tensor by tensor, so the host needs memory for only one tensor beyond the model. Pickled
    code is refused, never run. A model without data (on the meta device, or in a simulation) is only compared with the
    headers of the files; no tensor is read.

    Args:
        model: as built, before a strategy changes its layers.
        path: a folder with `config.json` and `model.safetensors` (or an index and its shards), or with `params.json`
            and `consolidated.*.pth`.

    Raises:
        UsageError: a file is missing, damaged or holds code; or weights are missing, unknown to the model, or not of
            its shape. The model is unchanged, unless the head of a tied model turns out not to be tied.
    """
    folder = Path(path)
    form = _format(folder)
    _check_shape(model.arch, form.read_shape(JsonFile.read(folder / form.CONFIG)), folder)
    stored = form.open_weights(folder, model.arch)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_names(set(parameters), set(stored), folder, tied=model.arch.tied_head)
    pieces = {name: list(_pieces(parameters[name], tensors, folder)) for name, tensors in stored.items()}
    if any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in parameters.values()):
        return
    head = pieces.pop(_HEAD, []) if model.arch.tied_head else []
    with torch.no_grad():
        for target, tensor in (piece for name in pieces for piece in pieces[name]):
            target.copy_(tensor.read())
        if not all(torch.equal(target, tensor.read().to(target)) for target, tensor in head):
            raise UsageError(
                f"weights {folder}: {_HEAD} differs from {_EMBEDDING}, but the model has one parameter for both: "
                "set tied_head=false"
            )


def _check_shape(arch: Architecture, shape: Mapping[str, Any], folder: Path) -> None:
    there = dataclasses.replace(arch, **shape)
    names = ("dim", "n_layers", "n_heads", "kv_heads", "hidden_dim", "vocab_size", "norm_eps", "rope_theta")
    differing = [
        f"{name} is {format_value(getattr(there, name))} in the files, {format_value(getattr(arch, name))} in the model"
        for name in (*names, "rope_scaling", "sliding_window", "tied_head")
        if getattr(there, name) != getattr(arch, name)
    ]
    if differing:
        raise UsageError(
            f"weights {folder}: of another model: {'; '.join(differing)}. To use their shape: --preset {folder}"
        )


def _check_names(expected: set[str], found: set[str], folder: Path, *, tied: bool) -> None:
    missing = expected - found - ({_HEAD} if tied else set())
    if missing == {_HEAD}:
        raise UsageError(f"weights {folder}: {_HEAD} is missing; if the head is the embedding, set tied_head=true")
    if missing:
        raise UsageError(f"weights {folder}: {len(missing)} of {len(expected)} tensors are missing: {listed(missing)}")
    if found - expected:
        raise UsageError(f"weights {folder}: the model has no parameter for {listed(found - expected)}")


def _pieces(parameter: Tensor, stored: list[StoredTensor], folder: Path) -> Iterator[tuple[Tensor, StoredTensor]]:
    """Pair each part of the parameter with the stored tensor that fills it.

    Meta's shards split matrices along one dimension, which follows from their shapes, and repeat vectors.
    """
    for tensor in stored:
        if tensor.dtype not in _READABLE:
            raise UsageError(
                f"weights {folder}: {tensor.place} has dtype {str(tensor.dtype).removeprefix('torch.')}; expected "
                "float32, float16, bfloat16 or float64 (quantized weights cannot be trained)"
            )
    shape, piece = tuple(parameter.shape), stored[0].shape
    if piece == shape and (len(stored) == 1 or len(shape) == 1):
        yield parameter.data, stored[0]
        return
    split = [d for d in range(len(shape)) if (*piece[:d], shape[d], *piece[d + 1 :]) == shape and piece[d]]
    shards = [shape[d] // piece[d] for d in split if shape[d] % piece[d] == 0]
    if shards and shards[0] > len(stored) and meta_format.has_weights(folder):
        raise UsageError(
            f"weights {folder}: {stored[0].place} is one of {shards[0]} shards, but only {len(stored)} are there: "
            f"{listed(f'consolidated.{index:02}.pth' for index in range(len(stored), shards[0]))} is missing"
        )
    for tensor in stored:
        if shards != [len(stored)] or tensor.shape != piece:
            of = f"1/{len(stored)} of " if len(stored) > 1 else ""
            raise UsageError(
                f"weights {folder}: {tensor.place} has shape {list(tensor.shape)}, expected {of}{list(shape)}"
            )
    yield from zip(parameter.data.chunk(len(stored), split[0]), stored, strict=True)


def save_weights(
    model: Llama,
    path: str | Path,
    format: Literal["huggingface", "meta"] = "huggingface",
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write the model's weights, in their dtype, to a new folder. The folder appears only when it is complete.

    LoRA updates must be merged first (`memscope.strategies.lora.merge`); to save them separately, use `save_adapter`.

    Args:
        model: the model, on any device.
        path: a folder that does not exist yet.
        format: `huggingface` (config.json and safetensors) or `meta` (params.json and consolidated.00.pth).
        tokenizer: the SentencePiece model to copy into the folder; None: no copy.

    Raises:
        UsageError: the folder exists, or the format cannot hold something in the model.
        MemscopeError: the disk is full or cannot be written.
    """
    if any(isinstance(module, LoRALinear) and not module.merged for module in model.modules()):
        raise UsageError(f"{path}: the model has LoRA updates that are not merged: merge them, or save the adapter")
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith((".lora_a", ".lora_b", ".magnitude"))
    }
    foreign = {name for name in weights if not name.endswith(".weight")}
    if foreign:
        raise UsageError(f"{path}: LLaMA's formats cannot hold {listed(foreign)}")
    writers: dict[str, Callable[[Mapping[str, Tensor], Architecture, Path], None]] = {
        "huggingface": hf_format.write,
        "meta": meta_format.write,
    }
    with new_folder(Path(path)) as folder:
        writers[format](weights, model.arch, folder)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER)


class without_initialization(TorchFunctionMode):  # noqa: N801 (used as a function: `with without_initialization():`)
    """Skip the initialization of new modules: for a model whose weights are read from files right afterwards."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
