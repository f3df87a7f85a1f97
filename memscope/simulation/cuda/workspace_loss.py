"""Workspaces of loss functions: intermediate tensors as large as the input, before its losses become one number.

The result of some losses keeps that size: see `memscope.simulation.cuda.kernel_results`. The workspaces of the sums and
means inside are those of `workspace_reduce.reduction`.
"""

from __future__ import annotations

from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_call import OperatorCall, TensorMeta, broadcast
from memscope.simulation.cuda.workspace_reduce import reduction

__all__ = [
    "binary_cross_entropy_with_logits",
    "ctc_loss",
    "huber_loss",
    "reduced_afterwards",
    "reduced_in_place",
    "soft_margin_loss_backward",
]

_LOSS = "aten/src/ATen/native/Loss.cpp"
_MEAN = 1
"""at::Reduction::Mean, the default of every loss; 0 is None, 2 is Sum."""


def _losses(call: OperatorCall) -> TensorMeta | None:
    """The losses of all elements; None: the losses are not reduced."""
    values, target = call.tensor("self"), call.tensor("target")
    if not call.get("reduction", _MEAN):
        return None
    return TensorMeta(broadcast(values.shape, target.shape), max(values, target, key=_width).dtype)


def _width(tensor: TensorMeta) -> tuple[bool, int]:
    return tensor.is_floating, tensor.item_bytes


def _reduce(call: OperatorCall, losses: TensorMeta) -> list[Workspace]:
    return reduction(OperatorCall("aten.mean", {"self": losses}, call.device, call.torch, call.settings))


def reduced_in_place(call: OperatorCall) -> list[Workspace]:
    """mse_loss and smooth_l1_loss: the losses, in addition to a result of the same size.

    Source: mse_loss_out and smooth_l1_loss_out in Loss.cpp, a revision after 2.5 and one after 2.9.
    """
    losses = _losses(call)
    return [Workspace("losses", losses.size_bytes, "op", _LOSS), *_reduce(call, losses)] if losses else []


def reduced_afterwards(call: OperatorCall) -> list[Workspace]:
    """binary_cross_entropy and soft_margin_loss: the mean of the losses; the losses themselves are in the result.

    Source: binary_cross_entropy_out_cuda in aten/src/ATen/native/cuda/Loss.cu and soft_margin_loss_out in Loss.cpp, a
        revision after 2.5 and one after 2.9.
    """
    losses = _losses(call)
    return [Workspace("mean", losses.item_bytes, "op", _LOSS), *_reduce(call, losses)] if losses else []


def huber_loss(call: OperatorCall) -> list[Workspace]:
    """The losses, before they are reduced to a result of one number.

    Source: huber_loss in Loss.cpp, a revision after 2.5 and one after 2.9.
    """
    losses = _losses(call)
    if losses is None:
        return []
    return [Workspace("losses", losses.size_bytes, "op", _LOSS, before_outputs=True), *_reduce(call, losses)]


def binary_cross_entropy_with_logits(call: OperatorCall) -> list[Workspace]:
    """log(sigmoid(x)), its weights if `pos_weight` is given, and the losses.

    Source: binary_cross_entropy_with_logits in Loss.cpp, a revision after 2.5 and one after 2.9.
    """
    values, target, positive = call.tensor("self"), call.tensor("target"), call.get("pos_weight")
    losses = _losses(call)
    sizes = {"log sigmoid": values.size_bytes}
    frees: tuple[str, ...] = ()
    if positive is not None:
        weighted = TensorMeta(broadcast(positive.shape, target.shape), target.dtype)
        sizes |= {"weight less 1": positive.size_bytes, "weights": weighted.size_bytes}
        frees = ("weight less 1", "weights")
    taken = [Workspace(name, size, "op", _LOSS, before_outputs=True) for name, size in sizes.items()]
    if losses is None:
        return taken
    made = Workspace("losses", losses.size_bytes, "op", _LOSS, before_outputs=True, frees=frees)
    return [*taken, made, *_reduce(call, losses)]


def ctc_loss(call: OperatorCall) -> list[Workspace]:
    """Lengths of inputs and targets, and where each target begins; in the backward pass also the logarithms of beta.

    Source: ctc_loss_gpu_template and ctc_loss_backward_gpu_template in aten/src/ATen/native/cuda/LossCTC.cu, a revision
        after 2.0. cuDNN's kernel, which takes targets of 32-bit integers only, is not modelled.
    """
    source = "aten/src/ATen/native/cuda/LossCTC.cu"
    batch = call.tensor("log_probs").shape[1]
    names = ("target lengths", "input lengths", "target offsets")
    taken = [Workspace(name, 8 * batch, "op", source, before_outputs=True) for name in names]
    kept = call.get("log_alpha")
    return [*taken, Workspace("log beta", kept.size_bytes, "op", source, before_outputs=True)] if kept else taken


def soft_margin_loss_backward(call: OperatorCall) -> list[Workspace]:
    """The negated target, its product with x, and the exponential of the product.

    Source: soft_margin_loss_backward_out in Loss.cpp, a revision after 2.5 and one after 2.9.
    """
    values, target = call.tensor("self"), call.tensor("target")
    product = TensorMeta(broadcast(values.shape, target.shape), values.dtype)
    return [
        Workspace("negative target", target.size_bytes, "op", _LOSS, before_outputs=True),
        Workspace("product", product.size_bytes, "op", _LOSS, before_outputs=True),
        Workspace("exponential", product.size_bytes, "op", _LOSS, before_outputs=True),
    ]
