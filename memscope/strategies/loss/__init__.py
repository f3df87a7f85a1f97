"""The strategy `loss`: the output head and the loss of a language model, computed in parts."""

from memscope.strategies.loss.loss import Loss

__all__ = ["Loss"]
