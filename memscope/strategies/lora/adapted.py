"""Adapted layers: a frozen linear layer of any class, and a trained low-rank update of its weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies.lora.linear import is_transposed, shape_of
from memscope.workload.quantized import is_quantized

__all__ = ["LoRALinear", "adapt", "merge", "unmerge"]


class LoRALinear(nn.Module):
    """A linear layer with its frozen weight and a trained low-rank update.

    `y = layer(x) + (dropout(x) · Aᵀ · Bᵀ) · alpha / r` with x `[..., in]`, A `[r, in]`, B `[out, r]`.
    A is initialized with standard deviation 1/r (Gaussian), B with zeros, so the output is unchanged at first. Both
    have the weight's dtype, or float32 if the weight is quantized.

    An adapted layer is still an instance of its own class, which computes `layer(x)`, with its names and weights.
    """

    weight: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    dropout: nn.Dropout
    scaling: float
    merged: bool
    _adds_in_place: ClassVar[bool]
    """Whether the update is added to the result in place. PEFT adds it out of place; so do layers whose result may be a
    view, or saved for their backward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        result: Tensor = super().forward(x, *args, **kwargs)
        if self.merged:
            return result
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


def adapt(model: nn.Module, names: Iterable[str], *, r: int, alpha: float, dropout: float) -> None:
    """Freeze the model and make each linear layer in `names` (full names) a `LoRALinear`, in place."""
    model.requires_grad_(False)
    for name in names:
        _adapt(model.get_submodule(name), r=r, alpha=alpha, dropout=dropout)


def _adapt(layer: Any, *, r: int, alpha: float, dropout: float) -> None:
    assert not isinstance(layer, LoRALinear), "a layer is adapted once"
    outputs, inputs = shape_of(layer)
    dtype = torch.float32 if is_quantized(layer) else layer.weight.dtype
    kind: Any = type(layer)
    layer.__class__ = _adapted_class(kind)
    layer.lora_a = nn.Parameter(layer.weight.new_empty(r, inputs, dtype=dtype))
    layer.lora_b = nn.Parameter(layer.weight.new_zeros(outputs, r, dtype=dtype))
    nn.init.normal_(layer.lora_a, std=1 / r)
    layer.dropout = nn.Dropout(dropout).train(layer.training)
    layer.scaling = alpha / r
    layer.merged = False


def _adapted(model: nn.Module) -> Iterator[LoRALinear]:
    yield from (module for module in model.modules() if isinstance(module, LoRALinear))


def _update(layer: LoRALinear) -> Tensor:
    """The update of a layer's weight, in the layout of that weight."""
    update = layer.scaling * (layer.lora_b @ layer.lora_a)
    return update.T if is_transposed(layer) else update


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every update to its weight, so that inference has no extra cost. Merging twice has no further effect.

    Raises:
        UsageError: a weight is quantized.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear) and is_quantized(layer):
            raise UsageError(f"the weight of {name} is quantized, and no update is merged into it: keep the adapter")
    for layer in _adapted(model):
        if not layer.merged:
            layer.weight.add_(_update(layer))
            layer.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Subtract every merged update from its weight again, up to rounding."""
    for layer in _adapted(model):
        if layer.merged:
            layer.weight.sub_(_update(layer))
            layer.merged = False
