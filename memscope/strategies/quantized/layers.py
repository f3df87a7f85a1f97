"""Replace linear layers by bitsandbytes' layers with 4-bit or 8-bit weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from memscope.strategies.lora.linear import is_transposed, shape_of
from memscope.strategies.quantized.library import Library, library

__all__ = ["Bits4", "Bits8", "full_precision_in_float32", "quantize"]


@dataclass(frozen=True)
class Bits4:
    """How weights are quantized to 4 bits; the names are those of `BitsAndBytesConfig` without `bnb_4bit_`."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    """Quantize the scales of the blocks, too (`use_double_quant`)."""
    compute: torch.dtype | None = torch.bfloat16
    """dtype of the unpacked weight and of the product; None: that of the layer's first input."""
    dtype: torch.dtype | None = None
    """dtype of the weight before it is quantized, in which its gradient's product unpacks it; None: as it is."""


@dataclass(frozen=True)
class Bits8:
    """How weights are quantized to 8 bits, as LLM.int8() does."""

    threshold: float = 6.0
    """Columns of the input with a value of at least this magnitude are multiplied in 16 bits; 0: none are."""


def quantize(model: nn.Module, names: Iterable[str], how: Bits4 | Bits8) -> None:
    """Quantize the weights of some linear layers, one after the other, and put bitsandbytes' layers in their place.

    Their biases stay as they are, and their weights are frozen.
    """
    found = library()
    for name in names:
        layer = model.get_submodule(name)
        made = _in_4_bits(found, layer, how) if isinstance(how, Bits4) else _in_8_bits(found, layer, how)
        made.bias = layer._parameters["bias"]
        model.set_submodule(name, made.train(layer.training))


def _in_4_bits(found: Library, layer: Any, how: Bits4) -> Any:
    made = _made(
        found.linear_4bit,
        shape_of(layer),
        compute_dtype=how.compute,
        compress_statistics=how.double,
        quant_type=how.quant_type,
    )
    packed, state = found.quantize_4bit(
        _weight(layer, how.dtype), blocksize=64, compress_statistics=how.double, quant_type=how.quant_type
    )
    fields = {
        "quant_state": state,
        "blocksize": 64,
        "compress_statistics": how.double,
        "quant_type": how.quant_type,
        "quant_storage": torch.uint8,
        "module": made,
        "bnb_quantized": True,
    }
    made.weight, made.quant_state = _parameter(found.params_4bit, packed, fields), state
    return made


def _in_8_bits(found: Library, layer: Any, how: Bits8) -> Any:
    made = _made(found.linear_8bit, shape_of(layer), has_fp16_weights=False, threshold=how.threshold)
    rounded, scales, _ = found.quantize_8bit(_weight(layer, torch.float16))
    made.weight = _parameter(found.params_8bit, rounded, {"CB": rounded, "SCB": scales, "has_fp16_weights": False})
    return made


def _shape(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    outputs, inputs = reversed(layer.weight.shape) if is_transposed(layer) else layer.weight.shape
    return outputs, inputs


def _weight(layer: Any, dtype: torch.dtype | None) -> Tensor:
    """The weight as it is quantized, `[out, in]`."""
    weight: Tensor = layer.weight.detach()
    weight = weight.T if is_transposed(layer) else weight
    return (weight if dtype is None else weight.to(dtype)).contiguous()


def _made(kind: Any, shape: tuple[int, int], **options: Any) -> Any:
    """A layer of the library without its weight: bitsandbytes cannot make one of fake tensors."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        made = kind(1, 1, bias=False, device="meta", **options)
    made.out_features, made.in_features = shape
    return made


def _parameter(kind: Any, data: Tensor, fields: dict[str, Any]) -> nn.Parameter:
    """A frozen parameter of the library's class; of a fake tensor, which the class refuses, one with its attributes."""
    if not isinstance(data, FakeTensor):
        return kind(data, requires_grad=False, **fields)  # type: ignore[no-any-return]
    made = nn.Parameter(data, requires_grad=False)
    vars(made).update(fields)
    return made


def full_precision_in_float32(model: nn.Module) -> None:
    """Freeze a model and convert its 16-bit weights, such as norms, embedding and head, to float32.

    Source: `prepare_model_for_kbit_training` in peft/utils/other.py (PEFT 0.21).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
