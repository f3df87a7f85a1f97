"""The linear layers of a model: which modules are linear, which can be adapted, and names that choose them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from memscope.workload.quantized import is_quantized

__all__ = [
    "adaptable_layers",
    "is_transposed",
    "linear_layers",
    "matches",
    "shape_of",
    "shortest_names",
    "tied_layers",
]


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the modules that map `[..., in]` to `[..., out]` by a weight of their own.

    These are `nn.Linear`, its subclasses, those with weights that bitsandbytes quantized among them, and transformers'
    `Conv1D`. Left out are other layers without a floating-point weight matrix (packed, or computed from other weights),
    the output projection of `nn.MultiheadAttention`, whose forward is never called, and layers that are adapted.
    """
    return [name for name, module in model.named_modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) and not is_transposed(module):
        return False
    weight = module._parameters.get("weight")
    return (
        not isinstance(module, NonDynamicallyQuantizableLinear)
        and "lora_a" not in module._parameters
        and weight is not None
        and not is_lazy(weight)
        and ((weight.is_floating_point() and weight.dim() == 2) or is_quantized(module))
    )


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    if is_quantized(layer):
        return layer.out_features, layer.in_features  # type: ignore[return-value]
    weight = layer._parameters["weight"]
    assert weight is not None, "a linear layer has a weight"
    outputs, inputs = reversed(weight.shape) if is_transposed(layer) else weight.shape
    return outputs, inputs


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module's weight is `[in, out]`: the `Conv1D` of transformers/pytorch_utils.py (GPT-2)."""
    # By name: transformers is no requirement, and takes seconds to import.
    return any(
        (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") for kind in type(module).__mro__
    )


def adaptable_layers(model: nn.Module) -> list[str]:
    """Linear layers that do not share their weight with another module."""
    tied = tied_layers(model)
    return [name for name in linear_layers(model) if name not in tied]


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Modules that share a parameter with another module, each with the name of that module.

    A LoRA update of one would not reach the other; merging it would then change both.
    """
    places: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for key, module in parent._modules.items():
            for parameter in module.parameters(recurse=False) if module else ():
                places.setdefault(id(parameter), []).append(f"{prefix}.{key}" if prefix else key)
    return {name: next(o for o in names if o != name) for names in places.values() if len(names) > 1 for name in names}


def matches(name: str, target: str) -> bool:
    """Whether a target, a full name or its last parts, names a module."""
    return name == target or name.endswith(f".{target}")


def shortest_names(chosen: Collection[str], linear: Collection[str]) -> tuple[str, ...]:
    """The fewest last parts of names that match every chosen layer, and no other linear layer."""
    others = [name for name in linear if name not in chosen]
    found: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[next((end for end in ends if not any(matches(other, end) for other in others)), name)] = None
    return tuple(found)
