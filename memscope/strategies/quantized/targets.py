"""The layers whose weights are quantized."""

from __future__ import annotations

from torch import nn

from memscope.strategies.lora.targets import all_linear
from memscope.workload.quantized import is_quantized

__all__ = ["quantizable", "quantized_layers"]


def quantizable(model: nn.Module) -> list[str]:
    """Every linear layer whose weight is quantized: all but the output head and those that share their weight.

    `from_pretrained` of transformers leaves out the same, and subclasses of `nn.Linear`. Source:
    `get_keys_to_not_convert` in quantizers/base.py, `replace_with_bnb_linear` in integrations/bitsandbytes.py (5.23).
    """
    return [
        name
        for name in all_linear(model)
        if (module := model.get_submodule(name)) and (type(module) is nn.Linear or not isinstance(module, nn.Linear))
    ]


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the modules whose weight is quantized already."""
    return [name for name, module in model.named_modules() if is_quantized(module)]
