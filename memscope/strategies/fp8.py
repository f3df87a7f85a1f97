"""Matrix products in 8-bit floating point, by torchao.float8."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.lora.targets import all_linear
from memscope.workload.description import Workload

__all__ = ["FP8"]

_MULTIPLE = 16
"""Sizes of a product on a GPU: `_scaled_mm_out_cuda` in aten/src/ATen/native/cuda/Blas.cpp, a revision after 2.8."""


class FP8(Strategy):
    """Compute the products of linear layers in 8-bit floating point, with torchao.float8; weights keep their precision.

    Input, weight and gradient are cast for each product, with scales from their largest values. Layers whose sizes are
    no multiples of 16, and the output head, stay as they are. A GPU needs compute capability 8.9 or higher.
    """

    name = "fp8"
    stage = Stage.LOAD
    exact = False
    trains = "how linear layers train"
    changes = "the precision of matrix products"
    provides = frozenset({"float8"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "–",
        "gradient": "–",
        "optimizer_state": "–",
        "computation": "–",
    }

    @dataclass(frozen=True)
    class Config:
        """How the casts are scaled."""

        recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
        """One scale for a tensor, or one for each row, as the recipes of torchao.float8 of these names."""
        pad: bool = False
        """Pad the operands, with a copy of each, where the tokens of a micro-batch are no multiple of 16, which a GPU
        needs (`pad_inner_dim` of torchao)."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """None: without a compiler that fuses the casts it saves neither memory nor time (docs/loss-fp8-pack.md)."""
        return []

    def check(self, workload: Workload) -> list[Problem]:
        """Report that torchao is missing, and a model without a layer that can be converted."""
        problems = []
        if importlib.util.find_spec("torchao") is None:
            what = "the layers are those of torchao.float8, and torchao is not installed"
            problems.append(Problem(what, 'run pip install "torch-memscope[torchao]"'))
        if not _converted(workload.model):
            what = f'"{workload.name}" has no linear layer besides its head whose sizes are multiples of {_MULTIPLE}'
            problems.append(Problem(what, "remove this strategy"))
        return problems

    def apply(self, workload: Workload) -> None:
        """Replace the linear layers by torchao's, which have the same weights."""
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        chosen = _converted(workload.model)
        config = dataclasses.replace(
            Float8LinearConfig.from_recipe_name(self.config.recipe), pad_inner_dim=self.config.pad
        )
        convert_to_float8_training(workload.model, module_filter_fn=lambda module, name: name in chosen, config=config)


def _converted(model: nn.Module) -> set[str]:
    """Names of the layers to convert."""
    found = {name: model.get_submodule(name) for name in all_linear(model)}
    return {name for name, layer in found.items() if isinstance(layer, nn.Linear) and _fits(layer)}


def _fits(layer: Any) -> bool:
    return all(size % _MULTIPLE == 0 for size in (layer.in_features, layer.out_features))
