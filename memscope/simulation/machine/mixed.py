"""Refuse operators whose arguments are on the host and on the GPU, as a GPU refuses them.

A program that forgets to move its batch would otherwise seem to train. Some operators take arguments of both: copies,
indices, lengths, numbers in tensors without dimensions. What is checked is therefore a list of the others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memscope.simulation.machine.places import Places

__all__ = ["refuse_mixed"]

_ONE_DEVICE = frozenset((
    "addmm", "mm", "bmm", "baddbmm", "addmv", "mv", "dot", "linear", "addbmm", "convolution", "embedding",
    "_embedding_bag", "cat", "stack", "gather", "scatter", "scatter_add", "index_select", "native_layer_norm",
    "_fused_rms_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit",
    "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "binary_cross_entropy", "smooth_l1_loss", "huber_loss",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_grouped_mm",
))  # fmt: skip
"""Operators, beside the pointwise ones, whose tensors must be on one device. Source: the checks that PyTorch generates
from aten/src/ATen/native/native_functions.yaml (`device_check`), and `TensorIteratorConfig::check_all_same_device`."""
_MIXES = frozenset(("copy_", "copy", "_to_copy", "fill_", "fill"))
"""Pointwise operators that take tensors of several devices."""


def refuse_mixed(places: Places, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse an operator of the GPU that has an argument on the host.

    Raises:
        RuntimeError: PyTorch's error.
    """
    if not _wants_one_device(func):
        return
    for tensor in _tensors(args if not kwargs else (*args, *kwargs.values())):
        if tensor.dim() and not places.is_on_gpu(tensor) and tensor.device.type != "meta":
            name = func.overloadpacket.__name__
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(when checking the arguments of {name}: a tensor {list(tensor.shape)} of {tensor.dtype} is on cpu)"
            )


@functools.cache
def _wants_one_device(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    name = func.overloadpacket.__name__
    return name in _ONE_DEVICE or (torch.Tag.pointwise in func.tags and name not in _MIXES)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if type(value) in (Tensor, FakeTensor, torch.nn.Parameter):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
