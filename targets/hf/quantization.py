"""Weights quantized by bitsandbytes, as the keys of `BitsAndBytesConfig` say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memscope.errors import UsageError, excerpt, nearest
from memscope.strategies.lora.linear import linear_layers
from memscope.strategies.quantized import Bits4, Bits8, quantize
from memscope.strategies.quantized.targets import quantizable
from memscope.targets.hf.libraries import needed
from memscope.targets.hf.recipe_peft import plain

__all__ = ["is_quantized_model", "parse_quantization", "prepared", "quantized", "read_quantization"]

_FLAGS = ("load_in_4bit", "load_in_8bit")
_ALIASES = {"_load_in_4bit": "load_in_4bit", "_load_in_8bit": "load_in_8bit"}
_KEYS = (
    *_FLAGS, "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "llm_int8_threshold",
    "llm_int8_skip_modules",
)  # fmt: skip
_WITHOUT_EFFECT = ("quant_method", "bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload")
"""Keys that do not change the bytes: another storage dtype holds the same packed weight."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_quantization(text: str) -> dict[str, Any]:
    """The keys of a text: load_in_4bit or load_in_8bit, and KEY=VALUE of `BitsAndBytesConfig`, joined by commas.

    Raises:
        UsageError: a word is neither.
    """
    values: dict[str, Any] = {}
    for word in text.split(","):
        key, equal, value = word.partition("=")
        if key not in _KEYS or (not equal and key not in _FLAGS):
            raise UsageError(f'hf: quantization="{text}": "{word}": {nearest(key, _KEYS)}')
        values[key] = plain(value) if equal else True
    return values


def read_quantization(values: Mapping[str, Any], place: str) -> Bits4 | Bits8:
    """How weights are quantized; defaults are those of `BitsAndBytesConfig` (transformers 5.23).

    Raises:
        UsageError: another library quantizes them, or a value is unknown; the message names it.
    """
    given = {_ALIASES.get(key, key): value for key, value in values.items()}
    method = given.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise UsageError(
            f"{place}: the weights are quantized ({method}), which is not supported: memscope simulates those of "
            "bitsandbytes. Give the model that was quantized"
        )
    four, eight = (bool(given.get(flag)) for flag in _FLAGS)
    if four == eight:
        raise UsageError(f"{place}: load_in_4bit and load_in_8bit are both {four}: choose one")
    if eight and given.get("llm_int8_has_fp16_weight"):
        raise UsageError(f"{place}: llm_int8_has_fp16_weight: true is not supported: 16-bit weights are not kept")
    if eight:
        return Bits8(float(given.get("llm_int8_threshold", 6.0)))
    kind = given.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise UsageError(f"{place}: bnb_4bit_quant_type: {excerpt(kind)}: {nearest(str(kind), ['nf4', 'fp4'])}")
    compute = str(given.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    if compute not in _DTYPES:
        raise UsageError(f"{place}: bnb_4bit_compute_dtype: {excerpt(compute)}: {nearest(compute, _DTYPES)}")
    return Bits4(kind, bool(given.get("bnb_4bit_use_double_quant")), _DTYPES[compute])


def quantized(model: Any, values: Mapping[str, Any], place: str) -> None:
    """Quantize the weights of a model as `from_pretrained` does, and say so as it does.

    Raises:
        UsageError: see `read_quantization`; or no layer can be quantized.
    """
    needed("bitsandbytes")
    how = read_quantization(values, place)
    skipped = values.get("llm_int8_skip_modules")
    names = quantizable(model) if not skipped else _unless(skipped, model)
    if not names:
        raise UsageError(f"{place}: the model has no linear layer whose weight could be quantized")
    # FlashAttention computes in this dtype: _is_quantized in transformers 5.23, _pre_quantization_dtype in 4.48.1
    model.config._is_quantized, model.config._pre_quantization_dtype = True, model.dtype
    quantize(model, names, how)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = isinstance(how, Bits4), isinstance(how, Bits8)
    model.quantization_method = "bitsandbytes"


def _unless(skipped: Any, model: nn.Module) -> list[str]:
    """Linear layers whose name has none of some parts (`should_convert_module` in quantizers_utils.py, 5.23)."""
    return [
        name
        for name in linear_layers(model)
        if type(model.get_submodule(name)) is nn.Linear
        and not any(part == name or f".{part}." in f".{name}." for part in skipped)
    ]


def is_quantized_model(model: nn.Module) -> bool:
    """Whether the weights were quantized."""
    return getattr(model, "quantization_method", None) == "bitsandbytes"


def prepared(model: nn.Module) -> None:
    """Prepare a quantized model for training with PEFT's own function, which converts other weights to float32."""
    peft = needed("peft")
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
