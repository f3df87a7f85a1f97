"""The head and the loss of a causal language model of transformers, replaced inside the model.

Such a model calls its head, and gives the logits to its `loss_function` with the labels. Here the head passes its input
on, and the loss function computes logits and loss in parts. So the program around the model stays as it is.

Source: `ForCausalLMLoss` and `fixed_cross_entropy` in transformers/loss/loss_utils.py, `loss_function` in
transformers/modeling_utils.py (5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies.loss.parts import Labelled, SummedLoss

__all__ = ["causal_lm", "replace_loss"]

_LOSS = "ForCausalLMLoss"


def causal_lm(model: nn.Module) -> Any | None:
    """The causal language model of transformers that a model is or wraps; None if there is none, or several."""
    found = list(_causal_lms(model))
    return found[0] if len(found) == 1 else None


def _causal_lms(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        # Of the class: wrappers, such as PEFT's, pass the attributes of the model inside on.
        own: Any = getattr(type(module), "loss_function", None)
        if not isinstance(own, property) or own.fset is None or not isinstance(_head(module), nn.Linear):
            continue
        if getattr(module.loss_function, "__name__", "") == _LOSS:
            yield module


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def replace_loss(model: Any, summed: SummedLoss, chunks: int) -> None:
    """Replace the head's forward, and the loss function, of a causal language model in training."""
    replaced = _Replaced(model, _head(model).forward, model.loss_function, summed, chunks)
    _head(model).forward = replaced.head
    model.loss_function = replaced.loss
    model.register_forward_pre_hook(replaced.begin)
    model.register_forward_hook(replaced.end)


@dataclass
class _Replaced:
    """A model whose head and loss are computed together."""

    model: Any
    forward: Callable[..., Tensor]
    """The head's own forward."""
    loss_function: Callable[..., Tensor]
    """The model's own loss function."""
    summed: SummedLoss
    chunks: int
    is_awaited: bool = False
    """Whether the next call of the head is that of the model itself, in training."""
    passed: Tensor | None = None
    """What the head has passed on, until the loss function gets it."""

    def begin(self, *_: Any) -> None:
        """The model's forward begins."""
        self.is_awaited, self.passed = self.model.training and torch.is_grad_enabled(), None

    def head(self, inputs: Tensor) -> Tensor:
        """The forward of the head: passes its input on where the loss follows, and else computes the logits."""
        if not self.is_awaited:
            return self.forward(inputs)
        self.is_awaited, self.passed = False, inputs
        return inputs

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """The loss function of the model; its arguments are those of `ForCausalLMLoss`."""
        passed, self.passed = self.passed, None
        if passed is None:
            return self.loss_function(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **others
            )
        if logits is not passed:
            raise UsageError(
                f"loss: {type(self.model).__name__} changes its logits between head and loss (scales, caps or cuts "
                "them), which is not computed in parts: leave loss out"
            )
        if shift_labels is None:
            shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
        tokens = Labelled(passed, shift_labels.to(passed.device), ignore_index, upcast=True)
        total = self.summed(_head(self.model), tokens, self.chunks)
        return total / (tokens.count if num_items_in_batch is None else num_items_in_batch)

    def end(self, *_: Any) -> None:
        """The model's forward ends: the loss function must have got what the head passed on."""
        passed, self.passed = self.passed, None
        if passed is not None:
            raise UsageError(
                f"loss: {type(self.model).__name__} was called without labels in training, so its loss is computed "
                "elsewhere from the logits: pass labels to the model, or change that loss in the program"
            )
