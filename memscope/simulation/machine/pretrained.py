"""Models that a simulated program loads from a hub or a folder: built from their configuration, without weights.

Of the files, only the configuration is read, and the dtype in the header of a safetensors file if the configuration
names none.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memscope.simulation.machine.libraries import Changes
from memscope.simulation.machine.places import Places
from memscope.simulation.refusal import NotSimulated

__all__ = ["pretrained_without_weights"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Names in the header of a safetensors file. Source: https://huggingface.co/docs/safetensors, "Format"."""


def pretrained_without_weights(places: Places, note: Callable[[str], None]) -> Changes:
    """The changes that load models without their weights; `note` is told that they were not read."""

    def from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:
            note("the weights of pretrained models were not read: a simulation needs their sizes only")
            return _built(cls, name, args, kwargs)

        return load

    def load_file(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(filename: Any, device: Any = "cpu") -> dict[str, Any]:
            found = {name: _on_host(places, *layout) for name, layout in _layouts(Path(filename)).items()}
            return {name: tensor.to(device) for name, tensor in found.items()}

        return load

    return {
        "transformers.modeling_utils": {"PreTrainedModel.from_pretrained": from_pretrained},
        "safetensors.torch": {"load_file": load_file},
    }


def _built(cls: Any, name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """A model of transformers from its configuration, where and as `from_pretrained` would leave it."""
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    config, dtype = kwargs.pop("config", None), kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if not isinstance(config, _config_class()):
        config, kwargs = cls.config_class.from_pretrained(config or name, return_unused_kwargs=True, **hub, **kwargs)
    quantized = kwargs.pop("quantization_config", None) or getattr(config, "quantization_config", None)
    if quantized is not None:
        raise NotSimulated(
            f"{cls.__name__}.from_pretrained was asked for quantized weights, which cannot be simulated yet: leave out "
            "quantization_config, or record a real run"
        )
    device_map = kwargs.pop("device_map", None)
    attention = {key: kwargs[key] for key in ("attn_implementation", "experts_implementation") if kwargs.get(key)}
    model: nn.Module = cls._from_config(config, dtype=_dtype(dtype, config, name), **attention)
    for module, kept in _kept_in_float32(model):
        module.to(kept)
    model.eval()
    return _placed(model, device_map)


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


def _on_host(places: Places, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    fake = places.stand_in_for(torch.empty(shape, dtype=dtype, device="meta"))
    places.hide(fake)
    return fake


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


def _placed(model: nn.Module, device_map: Any) -> nn.Module:
    """The model where a device map places it: as a whole, on one device."""
    if device_map is None:
        return model
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if devices <= {"auto", "balanced", "balanced_low_0", "sequential"}:
        devices = {"cuda"}
    if len(devices) > 1 or devices & {"disk"}:
        raise NotSimulated(
            f"device_map={device_map!r} spreads a model over several devices, which cannot be simulated: use one"
        )
    return model.to(devices.pop())
