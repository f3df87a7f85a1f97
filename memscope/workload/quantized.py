"""Weights that bitsandbytes quantized: how many elements they stand for, and the tensors that scale them.

A quantized weight is a parameter of packed integers. Its scales are no parameters and no buffers: a 4-bit weight has
them in `weight.quant_state`; an 8-bit weight has one scale per row, in `weight.SCB` and, from the first call on, in
`module.state.SCB`. Source: nn/modules.py and functional.py of bitsandbytes 0.50.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["elements", "is_quantized", "scales_of"]


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is quantized to 4 or 8 bits."""
    weight = _weight(module)
    return weight is not None and (_state(weight) is not None or bool(_row_scales(module)))


def scales_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that scale a module's quantized weight, by name as in its state dict; none if it is not quantized."""
    weight = _weight(module)
    state = None if weight is None else _state(weight)
    if state is None:
        return _row_scales(module)
    found = {"absmax": state.absmax, "quant_map": state.code}
    if state.state2 is not None:
        found |= {
            "nested_absmax": state.state2.absmax,
            "nested_quant_map": state.state2.code,
            "nested_offset": state.offset,
        }
    return found


def elements(parameter: Tensor) -> int:
    """Number of elements of a parameter; of a quantized one, that of the weight it stands for."""
    state = _state(parameter)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _weight(module: nn.Module) -> Tensor | None:
    """A module's own weight; the parameters of a scripted module are no dictionary."""
    return next((own for name, own in module.named_parameters(recurse=False) if name == "weight"), None)


def _state(weight: Tensor) -> Any:
    return getattr(weight, "quant_state", None)


def _row_scales(module: nn.Module) -> dict[str, Tensor]:
    weight = _weight(module)
    if weight is None or weight.dtype is not torch.int8:
        return {}
    held = (getattr(owner, "SCB", None) for owner in (weight, getattr(module, "state", None)))
    return next(({"SCB": scales} for scales in held if isinstance(scales, Tensor)), {})
