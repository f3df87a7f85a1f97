"""Models that a simulated program loads from a hub or a folder: built from their configuration, without weights.

Of the files, only the configuration is read, and the dtype in the header of a safetensors file if the configuration
names none.
"""

from __future__ import annotations

import inspect
import json
import struct
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memscope.simulation.machine.libraries import Changes
from memscope.simulation.machine.moves import gpu_named
from memscope.simulation.machine.places import Places
from memscope.simulation.refusal import NotSimulated

__all__ = ["pretrained_without_weights"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Names in the header of a safetensors file. Source: https://huggingface.co/docs/safetensors, "Format"."""


_NOT_READ = "the weights of pretrained models were not read: a simulation needs their sizes only"
_WARMED_UP = (
    "from_pretrained with a device_map first takes all weights as one block and frees it (caching_allocator_warmup of "
    "transformers), which shapes reserved memory"
)


def pretrained_without_weights(places: Places, note: Callable[[str], None]) -> Changes:
    """The changes that load models without their weights; `note` is told what was done instead."""

    def from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:
            note(_NOT_READ)
            device_map, wants_info = kwargs.pop("device_map", None), kwargs.pop("output_loading_info", False)
            model = _built(cls, name, kwargs)
            device = _device(device_map)
            if device is not None:
                if _warm_up(model, device):
                    note(_WARMED_UP)
                model.to(device)
            return (model, _NOTHING_MISSING) if wants_info else model

        return load

    def from_diffusers(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(cls: Any, name: Any = None, **kwargs: Any) -> Any:
            note(_NOT_READ)
            _refuse_quantized(cls, kwargs)
            hub = {key: kwargs[key] for key in _HUB if key in kwargs}
            model = cls.from_config(cls.load_config(name, **hub)).eval()
            dtype, device = kwargs.get("dtype") or kwargs.get("torch_dtype"), _device(kwargs.get("device_map"))
            model = model if dtype is None else model.to(dtype)
            return model if device is None else model.to(device)

        return load

    def load_peft_weights(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(model_id: Any, *args: Any, **kwargs: Any) -> Any:
            folder = Path(str(model_id)) / (kwargs.get("subfolder") or "")
            if folder.is_dir() and not [*folder.glob("adapter_model.*")]:
                return {}
            return original(model_id, *args, **kwargs)

        return load

    def load_file(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(filename: Any, device: Any = "cpu") -> dict[str, Any]:
            found = {name: places.on_host(*layout) for name, layout in _layouts(Path(filename)).items()}
            return {name: tensor.to(device) for name, tensor in found.items()}

        return load

    return {
        "transformers.modeling_utils": {"PreTrainedModel.from_pretrained": from_pretrained},
        "diffusers.models.modeling_utils": {"ModelMixin.from_pretrained": from_diffusers},
        "peft.utils.save_and_load": {"load_peft_weights": load_peft_weights},
        "safetensors.torch": {"load_file": load_file},
    }


def _built(cls: Any, name: Any, kwargs: dict[str, Any]) -> nn.Module:
    """A model of transformers from its configuration, on the host, as `from_pretrained` would leave it."""
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    config, dtype = kwargs.pop("config", None), kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if not isinstance(config, _config_class()):
        config, kwargs = cls.config_class.from_pretrained(config or name, return_unused_kwargs=True, **hub, **kwargs)
    _refuse_quantized(cls, {"quantization_config": getattr(config, "quantization_config", None), **kwargs})
    attention = {key: kwargs[key] for key in ("attn_implementation", "experts_implementation") if kwargs.get(key)}
    model: Any = cls._from_config(config, dtype=_dtype(dtype, config, name), **attention)
    for module, kept in _kept_in_float32(model):
        module.to(kept)
    model.eval()
    return model  # type: ignore[no-any-return]


def _refuse_quantized(cls: Any, kwargs: dict[str, Any]) -> None:
    """Refuse weights that another tool would quantize.

    Raises:
        NotSimulated: they are asked for.
    """
    for key in ("quantization_config", "load_in_4bit", "load_in_8bit", "gguf_file"):
        if kwargs.get(key):
            raise NotSimulated(
                f"{cls.__name__}.from_pretrained was asked for quantized weights ({key}), which cannot be simulated in "
                "a program: profile the model as hf:NAME --set quantization=load_in_4bit, or record a real run"
            )


_NOTHING_MISSING: dict[str, list[str]] = {
    "missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": [],
}  # fmt: skip
"""What `output_loading_info=True` tells of weights that were all there."""
_HUB = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip


def _config_class() -> type:
    from transformers import PretrainedConfig

    return PretrainedConfig


def _dtype(asked: Any, config: Any, name: Any) -> torch.dtype:
    """The dtype of the weights. Source: `_get_dtype` in transformers/modeling_utils.py (5.23)."""
    if asked is None:
        asked = "auto" if int(version("transformers").partition(".")[0]) >= 5 else torch.float32
    if asked == "auto":
        asked = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or _stored_dtype(name)
    found = getattr(torch, asked) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype):
        raise NotSimulated(f"from_pretrained(dtype={asked!r}) cannot be simulated: give one torch.dtype")
    return found


def _stored_dtype(name: Any) -> torch.dtype:
    """The dtype of the first floating-point tensor in a folder's weights; float32 if there are none to read."""
    folder = Path(str(name))
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        for _, dtype in _layouts(file).values():
            if dtype.is_floating_point:
                return dtype
    return torch.get_default_dtype()


def _layouts(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor in a safetensors file, from its header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: (tuple(one["shape"]), _DTYPES[one["dtype"]]) for name, one in header.items()}


def _kept_in_float32(model: nn.Module) -> list[tuple[nn.Module, torch.dtype]]:
    """Modules that stay in float32 whatever the dtype. Source: `_get_dtype_plan` in modeling_utils.py (5.23)."""
    plan: Any = getattr(model, "_get_dtype_plan", None)
    kept = plan(model.dtype) if plan else {}
    return [
        (module, dtype)
        for name, module in model.named_modules()
        for part, dtype in kept.items()
        if part in name.split(".") or name.endswith(part)
    ]


def _device(device_map: Any) -> Any:
    """The device where a device map places a model as a whole; None where it names none."""
    if device_map is None:
        return None
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if devices <= {"auto", "balanced", "balanced_low_0", "sequential"}:
        devices = {"cuda"}
    if len(devices) > 1 or devices & {"disk"}:
        raise NotSimulated(
            f"device_map={device_map!r} spreads a model over several devices, which cannot be simulated: use one"
        )
    return devices.pop()


def _warm_up(model: nn.Module, device: Any) -> bool:
    """Let transformers (4.50 and later) take and free the memory of all weights, if they go to the GPU."""
    from transformers import modeling_utils

    warm_up = getattr(modeling_utils, "caching_allocator_warmup", None)
    if warm_up is None or not gpu_named(device):
        return False
    quantizer = {"hf_quantizer": None} if "hf_quantizer" in inspect.signature(warm_up).parameters else {}
    warm_up(model, dict.fromkeys(model.state_dict(), "cuda:0"), **quantizer)
    return True
