"""Workspaces of reductions: norms of many tensors, gradients of normalization weights, sums, means and extrema."""

from __future__ import annotations

import math

from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_call import OperatorCall, TensorMeta, limits

__all__ = ["extremum", "foreach_norm", "norm_backward", "reduction"]


def foreach_norm(call: OperatorCall) -> list[Workspace]:
    """Norms of many tensors (gradient clipping): per tensor, one partial result per 65536 elements of the longest one.

    Norms of other orders than 1, 2 and infinity, and of mixed dtypes, run tensor by tensor and take no workspace here.

    Source: foreach_tensor_norm_cuda in aten/src/ATen/native/cuda/ForeachReduceOp.cu, 2.6.0; kChunkSize in
        MultiTensorApply.cuh, 2.6.0, 2.11.0, 2.13.0 and 2.15.0.
    """
    tensors: tuple[TensorMeta, ...] = tuple(call.get("self"))
    order = call.get("ord", 2)
    if order not in (1, 2, math.inf) or len({tensor.dtype for tensor in tensors}) != 1 or not tensors[0].is_floating:
        return []
    dtype = call.get("dtype") or tensors[0].dtype
    chunks = max(-(-tensor.numel // 65536) for tensor in tensors)
    size_bytes = len(tensors) * chunks * TensorMeta((), dtype).accumulate_bytes
    return [Workspace("norms of chunks", size_bytes, "op", "ATen/native/cuda/ForeachReduceOp.cu", before_outputs=True)]


def norm_backward(call: OperatorCall) -> list[Workspace]:
    """Weight gradients of layer and RMS norm over very many short rows: partial sums of 32 rows.

    Source: LaunchGammaBetaBackwardCUDAKernel in aten/src/ATen/native/cuda/layer_norm_kernel.cu; the libraries of 2.8.0
        to 2.15.0 have this path, those of 2.6.0 and 2.7.1 do not.
    """
    values, weight = call.tensor("input"), call.get("weight")
    width = math.prod(call.get("normalized_shape"))
    rows = values.numel // width
    if call.torch < (2, 8) or rows <= 64 * 1024 or width // 32 >= call.device.multiprocessors // 2 or weight is None:
        return []
    blocks = min(64 * 1024 // 2 // -(-width // 32), -(-rows // 32))
    wanted = tuple(call.get("output_mask", (True, True, True)))[1:]
    source = "aten/src/ATen/native/cuda/layer_norm_kernel.cu"
    names = ("partial weight gradients", "partial bias gradients")
    return [
        Workspace(name, blocks * width * weight.item_bytes, "op", source)
        for name, asked in zip(names, wanted, strict=False)
        if asked
    ]


def reduction(call: OperatorCall) -> list[Workspace]:
    """Sum, mean, or extremum with its index, over the outermost, the innermost or all dimensions of a dense tensor.

    The workspace is the buffer through which thread blocks share a result. PyTorch allocates it from 256 values per
    thread on: for example, for the gradient of a bias or a normalization weight over 1024 tokens or more, or for the
    maximum of each row of column-major logits. PyTorch's formula for its size counts outputs once too often, so the
    buffer reaches 64 MiB and more. Other layouts with 256 values or more per output are not modelled.

    Source: setReduceConfig, global_memory_size and semaphore_size in aten/src/ATen/native/cuda/Reduce.cuh, 2.6.0,
        2.11.0, 2.13.0, 2.15.0. The 16 bytes of a maximum are its value and its 64-bit index: measured on a GPU with
        2.6.
    """
    values, asked = call.tensor("self"), call.get("dim")
    order = _outermost_first(values)
    if values.numel == 0 or not values.is_floating or order is None:
        return []
    rank = len(values.shape)
    asked = (asked,) if isinstance(asked, int) else asked
    dims = {dim % rank for dim in asked} if asked and rank else set(range(rank))
    summed = [dim in dims for dim in order]
    leading, trailing = summed == sorted(summed, reverse=True), summed == sorted(summed)
    if not (leading or trailing):
        return []
    inputs = math.prod(values.shape[dim] for dim in dims)
    outputs = values.numel // inputs
    across = trailing  # adjacent threads share one sum; else they compute adjacent outputs
    vector = 1 if across else next(size for size in (4, 2, 1) if outputs % size == 0)
    first, second = (inputs // 4 if inputs >= 128 else inputs, outputs) if across else (outputs // vector, inputs)
    most = 512 // vector
    wide, high = (1 << (min(size, most).bit_length() - 1) for size in (first, second))
    height = min(high, most // min(wide, 32))
    width = min(wide, most // height)
    step_in, step_out = (width, 1) if across else (1, width)
    known = limits(call.device)
    if -(-inputs // step_in) < min(height * 16, 256):
        return []
    step_in *= height
    per_thread = -(-inputs // step_in)
    target = call.device.multiprocessors * (known.threads_per_multiprocessor // (width * height))
    grid = -(-(outputs // vector) // step_out)
    if per_thread < 256 or grid > target:
        return []
    splits = max(min(-(-target // grid), -(-per_thread // 16)), -(-per_thread // 256))
    if splits == 1:
        return []
    shared_bytes = 16 if call.op in ("aten.max", "aten.min") else values.accumulate_bytes
    size_bytes = shared_bytes * outputs * splits * (1 if across else width * vector)
    source = "aten/src/ATen/native/cuda/Reduce.cuh"
    estimate = values.size_bytes >= 2**31 or not known.exact  # larger ones are split in parts with buffers of their own
    return [
        Workspace("sums of thread blocks", size_bytes, "op", source, estimate=estimate),
        Workspace("semaphores", 4 * grid, "op", source, estimate=estimate),
    ]


def extremum(call: OperatorCall) -> list[Workspace]:
    """Maximum or minimum along a dimension, with its index; the extremum of a whole tensor is not modelled."""
    return reduction(call) if "dim" in call.arguments else []


def _outermost_first(tensor: TensorMeta) -> list[int] | None:
    """Dimensions of more than one element, in order of decreasing stride; None: the layout has gaps or overlaps."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size != 1]
    if tensor.strides is None:
        return dims
    strides = tensor.strides
    dims.sort(key=lambda dim: strides[dim], reverse=True)
    step = 1
    for dim in reversed(dims):
        if strides[dim] != step:
            return None
        step *= tensor.shape[dim]
    return dims
