"""Build the optimizer of a workload."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from memscope.errors import UsageError

__all__ = ["OptimizerFactory", "built_by", "built_or_none"]

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""`factory(parameters)`, or `factory(parameters, model)` with a parameter of that name."""


def built_by(
    factory: OptimizerFactory | None, parameters: Iterable[nn.Parameter], model: nn.Module
) -> torch.optim.Optimizer:
    """The optimizer that a factory builds; the model is passed to a factory with a parameter named `model`.

    Raises:
        UsageError: there is no factory: the workload is for inference.
    """
    if factory is None:
        raise UsageError("the workload is for inference: it has no optimizer (optimizer_factory=None)")
    return factory(parameters, model=model) if _takes_model(factory) else factory(parameters)


def built_or_none(factory: OptimizerFactory | None, model: nn.Module) -> torch.optim.Optimizer | None:
    """A trial of the optimizer that a factory builds; None if it cannot be built, which `Training.start` reports."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        return built_by(factory, trainable, model) if trainable else None
    except Exception:
        return None


def _takes_model(factory: Any) -> bool:
    try:
        return "model" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False
