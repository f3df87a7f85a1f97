"""The kernel workspace model: memory that CUDA kernels take from PyTorch's allocator, which no dispatch mode sees.

Each family of operators has one function, here or in a `workspace_*` module, with the source of its sizes: file and
PyTorch version. "Checked in" names versions whose released library has the same constants. Sizes that are not exactly
known are marked `estimate`; workspaces that are left out are in `NOT_MODELLED` with the reason. Operators in neither
take no workspaces, as far as is known. Sizes are requested bytes: the allocator rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_attention import (
    cudnn_backward,
    efficient_backward,
    efficient_forward,
    flash_backward,
    flash_forward,
    safe_softmax,
)
from memscope.simulation.cuda.workspace_blas import gemm, scaled_gemm
from memscope.simulation.cuda.workspace_call import (
    KernelSettings,
    OperatorCall,
    TensorMeta,
    broadcast,
    contiguous_copy,
    describe,
)
from memscope.simulation.cuda.workspace_flash_attn import (
    flash_attn_2_backward,
    flash_attn_2_forward,
    flash_attn_3_backward,
    flash_attn_3_forward,
)
from memscope.simulation.cuda.workspace_linear_loss import linear_cross_entropy
from memscope.simulation.cuda.workspace_loss import (
    binary_cross_entropy_with_logits,
    ctc_loss,
    huber_loss,
    reduced_afterwards,
    reduced_in_place,
    soft_margin_loss_backward,
)
from memscope.simulation.cuda.workspace_reduce import extremum, foreach_norm, norm_backward, reduction
from memscope.simulation.devices.catalogue import Device

__all__ = ["NOT_MODELLED", "OPERATORS", "KernelSettings", "TensorMeta", "Workspace", "describe", "workspaces_for"]


def workspaces_for(
    op: str,
    arguments: Mapping[str, Any],
    device: Device,
    torch_version: tuple[int, int],
    settings: KernelSettings | None = None,
) -> list[Workspace]:
    """Return the workspaces of one call of an operator, in order of allocation.

    Args:
        op: the operator's name with overload, such as `aten.addmm.default`.
        arguments: the arguments as `describe` returns them; missing arguments have their defaults.
        device: the device that runs the call; a CPU takes no workspaces.
        torch_version: (major, minor).
        settings: environment variables and modes that change workspaces; None: PyTorch's defaults.
    """
    family = _FAMILIES.get(op.rpartition(".")[0])
    if family is None or device.kind != "cuda":
        return []
    return family(OperatorCall(op.rpartition(".")[0], arguments, device, torch_version, settings or KernelSettings()))


def _embedding_backward(call: OperatorCall) -> list[Workspace]:
    """Gradient of an embedding: up to 3072 indices need no sort; more are sorted and summed in segments of 10 rows.

    The scratch memory of cub's unique_by_key and exclusive_sum, a few KiB, is not modelled.

    Sources: embedding_dense_backward_cuda in aten/src/ATen/native/cuda/Embedding.cu and embedding_backward_cuda_kernel
        in EmbeddingBackwardKernel.cu, 2.6.0; the fused kernel from a later revision of the latter. Checked in 2.9.1 (no
        fused kernel), 2.11.0, 2.13.0 and 2.15.0.
    """
    grad, indices = call.tensor("grad_output"), call.tensor("indices")
    source = "aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu"
    taken = [
        copy
        for name, tensor in (("indices", indices), ("grad", grad))
        for copy in contiguous_copy(name, tensor, source)
    ]
    count, width, rows = indices.numel, grad.shape[-1], int(call.get("num_weights"))
    by_frequency = bool(call.get("scale_grad_by_freq", False))
    if count <= 3072 and not by_frequency:
        return taken
    segments = min(count, rows)
    partials = count // 10 + segments

    def take(name: str, elements: int, item_bytes: int, **how: Any) -> None:
        taken.append(Workspace(name, elements * item_bytes, "op", source, **how))

    index_bytes = indices.item_bytes
    for name in ("sorted indices", "original positions", "range"):
        take(name, count, index_bytes, before_outputs=True)
    taken.append(replace(_sort_scratch(count, index_bytes, source), before_outputs=True))
    done: tuple[str, ...] = ("range", "sort scratch")
    if by_frequency:
        take("counts", count, index_bytes, before_outputs=True, frees=done)
        done = ()
    take("segment offsets", count, index_bytes, frees=done)
    take("number of segments", 1, 8)
    take("partials per segment", segments, index_bytes)
    take("offsets of partials", segments, index_bytes)
    take("number of partials", 1, 8)
    take("partial segment offsets", partials, index_bytes)
    padded_width = -(-width // 32) * 32
    blocks = -(-segments * padded_width // min(padded_width, 1024))
    fused = call.torch >= (2, 11) and not call.settings.deterministic
    if fused and blocks < 4 * call.device.multiprocessors and partials > 4 * blocks:
        take("segment of each partial", partials, index_bytes)
        if grad.item_bytes == 2:
            take("fp32 gradient of the weight", rows * width, 4)
    else:
        take("sum of each partial", partials * width, grad.accumulate_bytes)
    return taken


def _sort_scratch(count: int, item_bytes: int, source: str) -> Workspace:
    """Scratch memory for sorting keys with values of the same size: one unused byte if a single block sorts them.

    A single block sorts up to 256 threads × 19 four-byte items. For more, cub::DeviceRadixSort documents O(N) temporary
    storage: second buffers of keys and values, and histograms, which are left out here. Source: SingleTilePolicy in
    cub/device/dispatch/tuning/tuning_radix_sort.cuh, the same for every architecture from 3.5 to 10.0. Measured on
    GPUs: 1 byte for 512, 1024 and 2048 items of 8 bytes, 72,191 bytes for 4096 and 138,751 bytes for 8192.
    """
    if count <= 256 * (19 * 4 // item_bytes):
        return Workspace("sort scratch", 1, "op", source)
    return Workspace("sort scratch", 2 * count * item_bytes, "op", source, estimate=True)


def _softmax_backward(call: OperatorCall) -> list[Workspace]:
    """The product of gradient and output, as large as the gradient.

    The backward of log_softmax has no such product.

    Source: softmax_backward_cuda_out in aten/src/ATen/native/cuda/SoftMax.cu, a revision before 2.6; 2.11.0 still
        allocates it.
    """
    size_bytes = call.tensor("grad_output").size_bytes
    return [Workspace("gradient times output", size_bytes, "op", "aten/src/ATen/native/cuda/SoftMax.cu")]


def _index_put(call: OperatorCall) -> list[Workspace]:
    """Sort of the indices, made to add values at indices that may repeat (the gradient of indexing).

    Deterministic mode also sorts without `accumulate`.

    Source: index_put_with_sort_kernel in aten/src/ATen/native/cuda/Indexing.cu, 2.6.0.
    """
    indices = tuple(index for index in call.get("indices") if index is not None)
    sorts = bool(call.get("accumulate", False)) or call.settings.deterministic
    if not sorts or not indices or any(index.dtype in ("bool", "uint8") for index in indices):
        return []  # a mask has one index per true value, and a simulation does not know its values
    source = "aten/src/ATen/native/cuda/Indexing.cu"
    count = math.prod(broadcast(*(index.shape for index in indices)))
    values, target = call.tensor("values"), call.tensor("self")
    places = [place for place, index in enumerate(call.get("indices")) if index is not None]
    # PyTorch moves indexed dimensions that are not adjacent to the front, with copies that depend on strides.
    apart = places != list(range(places[0], places[-1] + 1))
    kept = [size for dim, size in enumerate(target.shape) if dim not in places]
    whole = TensorMeta((count * math.prod(kept),), values.dtype)
    copied = values.numel != whole.numel or not values.is_contiguous
    later = [
        *([Workspace("contiguous copy of values", whole.size_bytes, "op", source)] if copied else []),
        Workspace("sorted indices", 8 * count, "op", source),
        Workspace("original positions", 8 * count, "op", source),
        Workspace("range", 8 * count, "op", source),
        _sort_scratch(count, 8, source),
    ]
    taken = [
        *contiguous_copy("self", target, source),
        Workspace("indices in range", 8 * count, "op", source),
        Workspace("linear indices", 8 * count, "op", source),
        replace(later[0], frees=("indices in range",)),
        *later[1:],
    ]
    return [workspace.uncertain() for workspace in taken] if apart else taken


def _power(call: OperatorCall) -> list[Workspace]:
    """The base of a power whose exponents are a tensor (as in rotary embeddings), copied to the device.

    Source: pow_Scalar_out in aten/src/ATen/native/Pow.cpp; measured on a GPU with 2.6: 8 bytes for `10000 ** tensor`.
    """
    base = call.get("self")
    if isinstance(base, TensorMeta) or base == 1:
        return []
    return [Workspace("base", 16 if isinstance(base, complex) else 8, "op", "aten/src/ATen/native/Pow.cpp")]


_FAMILIES: dict[str, Callable[[OperatorCall], list[Workspace]]] = {
    **dict.fromkeys(("aten.mm", "aten.addmm", "aten._addmm_activation", "aten.bmm", "aten.baddbmm"), gemm),
    **dict.fromkeys(("aten.mv", "aten.addmv", "aten.dot", "aten.vdot"), gemm),
    "aten._scaled_mm": scaled_gemm,
    "aten._scaled_dot_product_flash_attention": flash_forward,
    "aten._scaled_dot_product_flash_attention_backward": flash_backward,
    **dict.fromkeys(("memscope.flash_attn_2_forward", "flash_attn._flash_attn_forward"), flash_attn_2_forward),
    **dict.fromkeys(
        (
            "memscope.flash_attn_2_backward",
            "flash_attn._flash_attn_backward",  # an installed package that was imported before the simulation
            "flash_attn._flash_attn_varlen_backward",
        ),
        flash_attn_2_backward,
    ),
    "memscope.flash_attn_3_forward": flash_attn_3_forward,
    "memscope.flash_attn_3_backward": flash_attn_3_backward,
    "aten._scaled_dot_product_efficient_attention": efficient_forward,
    "aten._scaled_dot_product_efficient_attention_backward": efficient_backward,
    "aten._scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    "aten._safe_softmax": safe_softmax,
    "aten.embedding_dense_backward": _embedding_backward,
    **dict.fromkeys(("aten.index_put", "aten.index_put_", "aten._index_put_impl_"), _index_put),
    "aten.pow": _power,
    "aten._softmax_backward_data": _softmax_backward,
    "aten._foreach_norm": foreach_norm,
    **dict.fromkeys(("aten.native_layer_norm_backward", "aten._fused_rms_norm_backward"), norm_backward),
    **dict.fromkeys(("aten.sum", "aten.mean"), reduction),
    **dict.fromkeys(("aten.max", "aten.min"), extremum),
    **dict.fromkeys(("aten.mse_loss", "aten.smooth_l1_loss"), reduced_in_place),
    **dict.fromkeys(("aten.binary_cross_entropy", "aten.soft_margin_loss"), reduced_afterwards),
    "aten.huber_loss": huber_loss,
    **dict.fromkeys(("aten._ctc_loss", "aten._ctc_loss_backward"), ctc_loss),
    "aten.binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "aten.soft_margin_loss_backward": soft_margin_loss_backward,
    "torch_nn._linear_cross_entropy_batch_chunked": linear_cross_entropy,
}

OPERATORS = frozenset(_FAMILIES)
"""Operators, without overload, that `workspaces_for` models; others take no workspace or are in `NOT_MODELLED`."""

_LIBRARY = "the operator's library chooses an algorithm, and thereby the workspace, at run time"
_CUB = (
    "the scratch memory of cub's sorts, scans and selections depends on build and device: from a few KiB to twice the "
    "input"
)
_PACKED = "the source for buffers of sequences packed by length was not read"
_SHARED = "thread blocks share a result in a buffer, as for sums (Reduce.cuh), but element sizes differ"

NOT_MODELLED: Mapping[str, str] = {
    **dict.fromkeys(
        ("aten.convolution", "aten.convolution_backward", "aten._cudnn_rnn", "aten._cudnn_rnn_backward"), _LIBRARY
    ),
    "aten._scaled_dot_product_cudnn_attention": _LIBRARY,
    **dict.fromkeys(("aten.native_batch_norm", "aten.native_batch_norm_backward"), _LIBRARY),
    **dict.fromkeys(("aten._grouped_mm", "aten._int_mm"), "the source of grouped and integer products was not read"),
    **dict.fromkeys(("aten._flash_attention_forward", "aten._flash_attention_backward"), _PACKED),
    **dict.fromkeys(("aten.sort", "aten.argsort", "aten.topk", "aten.cumsum", "aten.cumprod", "aten.nonzero"), _CUB),
    **dict.fromkeys(("aten.masked_select", "aten._unique2", "aten.unique_consecutive", "aten.multinomial"), _CUB),
    **dict.fromkeys(("aten.var", "aten.std", "aten.var_mean", "aten.linalg_vector_norm", "aten.norm"), _SHARED),
    **dict.fromkeys(("aten.amax", "aten.amin", "aten.argmax", "aten.argmin", "aten.prod"), _SHARED),
}
"""Operator, without overload → the reason why its workspaces are not modelled."""
