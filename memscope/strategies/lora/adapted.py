"""Adapted layers: a frozen linear layer of any class, and a trained low-rank update of its weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies.lora.linear import shape_of
from memscope.strategies.lora.magnitude import low_rank, stored, weight_norm, with_magnitude
from memscope.strategies.lora.start import Start, initialize
from memscope.workload.quantized import is_quantized

__all__ = ["LoRALinear", "adapt", "adapted_layers", "merge", "unmerge"]


class LoRALinear(nn.Module):
    """A linear layer with its frozen weight and a trained low-rank update.

    `y = layer(x) + (dropout(x) · Aᵀ · Bᵀ) · scaling` with x `[..., in]`, A `[r, in]`, B `[out, r]`, and scaling
    alpha / r, or alpha / √r (rsLoRA). With a magnitude m `[out]` (DoRA), all but the bias is then multiplied by
    `m / ‖W + scaling · B · A‖`. A and B have the weight's dtype, or float32 if the weight is quantized.

    An adapted layer is still an instance of its own class, which computes `layer(x)`, with its names and weights.
    """

    weight: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    magnitude: nn.Parameter | None
    dropout: nn.Dropout
    scaling: float
    start: Start
    merged: bool
    _factor: Tensor
    """What DoRA has multiplied a merged weight by."""
    _adds_in_place: ClassVar[bool]
    """Whether the update is added to the result in place. PEFT adds it out of place; so do layers whose result may be a
    view, or saved for their backward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        result: Tensor = super().forward(x, *args, **kwargs)
        if self.merged:
            return result
        if self.magnitude is not None:
            return result + with_magnitude(self, x, result)
        update: Tensor = (self.dropout(x) @ self.lora_a.T @ self.lora_b.T) * self.scaling
        if self._adds_in_place:
            result += update
            return result
        return result + update

    def extra_repr(self) -> str:
        """The text that `print(model)` shows for this layer."""
        return ", ".join(filter(None, [super().extra_repr(), f"r={self.lora_a.shape[0]}, scaling={self.scaling}"]))


@cache
def _adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """`LoRALinear` over the class of a linear layer."""
    return type(f"LoRA{kind.__name__}", (LoRALinear, kind), {"_adds_in_place": kind is nn.Linear})


def adapt(
    model: nn.Module,
    names: Iterable[str],
    *,
    r: int,
    alpha: float,
    dropout: float,
    rslora: bool = False,
    dora: bool = False,
    start: Start = "gaussian",
) -> None:
    """Freeze the model and make each linear layer in `names` (full names) a `LoRALinear`, in place."""
    model.requires_grad_(False)
    for name in names:
        layer: Any = model.get_submodule(name)
        assert not isinstance(layer, LoRALinear), "a layer is adapted once"
        if is_quantized(layer) and (dora or start != "gaussian"):
            raise UsageError(f"the weight of {name} is quantized, and DoRA, PiSSA and OLoRA read it: use plain LoRA")
        outputs, inputs = shape_of(layer)
        dtype = torch.float32 if is_quantized(layer) else layer.weight.dtype
        kind: Any = type(layer)
        layer.__class__ = _adapted_class(kind)
        layer.lora_a = nn.Parameter(layer.weight.new_empty(r, inputs, dtype=dtype))
        layer.lora_b = nn.Parameter(layer.weight.new_zeros(outputs, r, dtype=dtype))
        layer.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        layer.start = start
        initialize(layer, start)
        layer.magnitude = nn.Parameter(weight_norm(layer)) if dora else None
        layer.dropout = nn.Dropout(dropout).train(layer.training)
        layer.merged = False


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every update to its weight, so that inference has no extra cost. Merging twice has no further effect.

    Raises:
        UsageError: a weight is quantized.
    """
    for name, layer in adapted_layers(model).items():
        if is_quantized(layer):
            raise UsageError(f"the weight of {name} is quantized, and no update is merged into it: keep the adapter")
    for layer in adapted_layers(model).values():
        if not layer.merged:
            factor = _factor(layer)
            layer.weight.add_(stored(layer, low_rank(layer)))
            if factor is not None:
                layer.weight.mul_(factor)
                layer._factor = factor
            layer.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Subtract every merged update from its weight again, up to rounding."""
    for layer in adapted_layers(model).values():
        if layer.merged:
            if layer.magnitude is not None:
                layer.weight.div_(layer._factor)
            layer.weight.sub_(stored(layer, low_rank(layer)))
            layer.merged = False


def _factor(layer: LoRALinear) -> Tensor | None:
    """What DoRA multiplies the rows of the updated weight by, in the layout of the weight."""
    if layer.magnitude is None:
        return None
    return stored(layer, (layer.magnitude / weight_norm(layer)).view(-1, 1))
