"""flash_attn.losses.cross_entropy: the loss of logits as one kernel, which keeps the logits and one number a token.

The time of the kernel is not estimated. Source: flash_attn/losses/cross_entropy.py and
flash_attn/ops/triton/cross_entropy.py of flash-attention 2.8.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.simulation.refusal import NotSimulated

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, lse: Tensor | None, inplace: bool) -> tuple[Tensor, Tensor]:
        if labels.dtype == torch.int64 and labels.storage_offset() % 2:  # the kernel needs addresses of 16 bytes
            labels = F.pad(labels, (0, 1))[..., :-1]
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        lse = torch.empty_like(losses) if lse is None else lse.contiguous()
        z_losses = torch.empty_like(losses)
        ctx.save_for_backward(logits, lse, labels)
        ctx.mark_non_differentiable(z_losses)
        ctx.inplace = inplace
        return losses, z_losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits = ctx.saved_tensors[0]
        return logits if ctx.inplace else torch.empty_like(logits), None, None, None


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each token in float32, `[tokens]`, and its part for the square of the log-sum-exp.

    Args:
        logits: `[tokens, vocabulary]`.
        labels: `[tokens]`.
        precomputed_lse: used only without smoothing and scale, as in the package.
        label_smoothing: share of the other classes.
        logit_scale: multiplies the logits.
        lse_square_scale: weight of the square.
        ignore_index: label without a loss.
        inplace_backward: write the gradient into the logits.
        process_group: must be None.

    Raises:
        NotSimulated: the shapes do not fit, or there is a process group.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise NotSimulated(
            "flash_attn's cross entropy takes logits [tokens, vocabulary] and labels [tokens], and got "
            f"{list(logits.shape)} and {list(labels.shape)}. Flatten them"
        )
    if process_group is not None:
        raise NotSimulated("flash_attn's cross entropy over a process group is not simulated: there is one GPU")
    lse = precomputed_lse if logit_scale == 1 and label_smoothing == 0 else None
    losses: tuple[Tensor, Tensor] = _Loss.apply(logits, labels, lse, inplace_backward)  # type: ignore[no-untyped-call]
    return losses


class CrossEntropyLoss(nn.Module):
    """The loss as a module; its arguments are those of `cross_entropy_loss`, and how losses are reduced."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotImplementedError("Only support reduction = 'mean' or 'none' or 'sum'")
        self.reduction, self.return_z_loss = reduction, return_z_loss
        self._options: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "lse_square_scale": lse_square_scale,
            "ignore_index": ignore_index,
            "inplace_backward": inplace_backward,
            "process_group": process_group,
        }

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        """The loss, and its part for the square of the log-sum-exp if `return_z_loss` is true."""
        found = cross_entropy_loss(input, target, precomputed_lse, **self._options)
        reduced = [self._reduced(losses, target) for losses in found[: 1 + self.return_z_loss]]
        return tuple(reduced) if self.return_z_loss else reduced[0]

    def _reduced(self, losses: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "mean":
            counted: Tensor = target != self._options["ignore_index"]
            return losses.sum() / counted.sum()
        return losses.sum() if self.reduction == "sum" else losses
