"""The biases of a model."""

from __future__ import annotations

from torch import nn

__all__ = ["biases"]


def biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `bias` in the last part of their name, by full name; those of norms are included.

    BitFit trains these, and so does PEFT with `bias="all"` (`_mark_only_adapters_as_trainable` in
    peft/tuners/tuners_utils.py, 0.21).
    """
    return {name: parameter for name, parameter in model.named_parameters() if "bias" in name.rpartition(".")[2]}
