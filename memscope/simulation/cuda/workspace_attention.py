"""Workspaces of scaled dot-product attention: flash, memory-efficient, cuDNN and math kernels, forward and backward.

Arguments have the shapes of aten: query, key, value, out and grad_out are [batch, heads, sequence, head size].
"""

from __future__ import annotations

import math

from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_call import OperatorCall, TensorMeta, contiguous_copy, limits

__all__ = [
    "cudnn_backward",
    "efficient_backward",
    "efficient_forward",
    "flash_backward",
    "flash_forward",
    "rounded_up",
    "safe_softmax",
    "split_keys",
]

_FLASH = "aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp"
_BACKWARD = "aten/src/ATen/native/transformers/cuda/attention_backward.cu"
_CUDNN = "aten/src/ATen/native/cudnn/MHA.cpp"
_EFFICIENT = "aten/src/ATen/native/transformers/cuda/attention.cu"


def rounded_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple


def _head_size_rounded(size: int, torch: tuple[int, int]) -> int:
    """Head size in the fp32 buffers of flash kernels: a multiple of 32; from 2.11 on, above 128, a multiple of 64.

    Source: mha_fwd and mha_bwd in flash_api.cpp, 2.6.0. The later rule was read from the libraries of 2.11.0, 2.13.0
        and 2.15.0, the earlier one from those of 2.6.0 to 2.10.0.
    """
    return rounded_up(rounded_up(size, 8), 64 if size > 128 and torch >= (2, 11) else 32)


def flash_forward(call: OperatorCall) -> list[Workspace]:
    """Accumulators of a split-KV run, which splits the keys among more thread blocks when there are too few of them.

    Source: set_params_splitkv in flash_api.cpp, 2.6.0; its constants checked in 2.13.0.
    """
    query, key = call.tensor("query"), call.tensor("key")
    return split_keys(call, query, key, _head_size_rounded(query.shape[-1], call.torch), _FLASH)


def split_keys(call: OperatorCall, query: TensorMeta, key: TensorMeta, width: int, source: str) -> list[Workspace]:
    """Accumulators of a split-KV run; none with dropout.

    Args:
        call: the call of a forward operator.
        query: `[batch, heads, sequence, head size]`, like `key`.
        key: the keys, with as many heads or fewer.
        width: head size in the accumulators.
        source: source file.
    """
    (batch, heads, queries, size), (key_heads, keys) = query.shape, key.shape[1:3]
    if call.get("dropout_p", 0.0) > 0 or not (queries and keys):
        return []
    if queries == 1 and heads > key_heads and size % 8 == 0:
        queries, heads = heads // key_heads, key_heads  # flash lays out the grouped heads of a single query as queries
    keys_per_block = 256 if size <= 64 else 128 if size <= 128 else 64
    blocks = batch * heads * -(-queries // 64)
    splits = _splits(blocks, 2 * call.device.multiprocessors, -(-keys // keys_per_block))
    if splits == 1:
        return []
    rows = splits * batch * heads * queries
    return [
        Workspace("log-sum-exp of each split", 4 * rows, "op", source),
        Workspace("output of each split", 4 * rows * width, "op", source),
    ]


def _splits(blocks: int, multiprocessors: int, key_blocks: int) -> int:
    """Smallest number of splits, at most 128, that reaches 85 % of the best efficiency (num_splits_heuristic)."""
    if blocks >= 0.8 * multiprocessors:
        return 1
    efficiency = {}
    for splits in range(1, min(128, multiprocessors, key_blocks) + 1):
        if splits == 1 or -(-key_blocks // splits) != -(-key_blocks // (splits - 1)):
            waves = blocks * splits / multiprocessors
            efficiency[splits] = waves / math.ceil(waves)
    best = max(efficiency.values())
    return next(splits for splits, reached in efficiency.items() if reached >= 0.85 * best)


def flash_backward(call: OperatorCall) -> list[Workspace]:
    """fp32 accumulator of dQ, row sums of dO · O, and, where heads are grouped, dK and dV of every query head.

    Deterministic mode has one accumulator of dQ for each group of thread blocks.

    Source: mha_bwd in flash_api.cpp and _flash_attention_backward in attention_backward.cu, 2.6.0; allocations and
        roundings checked in 2.11.0, 2.13.0 and 2.15.0.
    """
    query, key = call.tensor("query"), call.tensor("key")
    (batch, heads, queries, size), (key_heads, keys) = query.shape, key.shape[1:3]
    accumulators = -(-call.device.multiprocessors // (batch * heads)) if call.settings.deterministic else 1
    rows = batch * heads * rounded_up(queries, 128)
    expanded = TensorMeta((batch, keys, heads, size), query.dtype).size_bytes
    return [
        *contiguous_copy("grad_out", call.tensor("grad_out").transposed(1, 2), _BACKWARD),
        *contiguous_copy("out", call.tensor("out").transposed(1, 2), _BACKWARD),
        Workspace("row sums of dO·O", 4 * rows, "op", _FLASH),
        Workspace("dQ accumulator", 4 * accumulators * rows * _head_size_rounded(size, call.torch), "op", _FLASH),
        *(Workspace(f"{name} of every head", expanded, "op", _FLASH) for name in ("dK", "dV") if key_heads != heads),
    ]


def cudnn_backward(call: OperatorCall) -> list[Workspace]:
    """fp32 accumulator of dQ and row sums of dO · O in one buffer; a copy of dO if its rows have gaps.

    The size of the buffer is an estimate: the kernel that cuDNN chooses may take more in it.

    Source: run_cudnn_SDP_bprop in aten/src/ATen/native/cudnn/MHA.cpp, several revisions of 2.9 to 2.15, and
        get_fe_workspace_size_node of the backward node in
        include/cudnn_frontend/node/scaled_dot_product_flash_attention.h of NVIDIA/cudnn-frontend, 1.12.0 to 1.23.0.
    """
    grad = call.tensor("grad_out")
    batch, heads, queries, size = call.tensor("query").shape
    rows = batch * heads * queries
    copied = grad.strides is not None and grad.strides[-1] != 1
    return [
        *([Workspace("copy of grad_out", grad.size_bytes, "op", _CUDNN)] if copied else []),
        Workspace("cuDNN attention workspace", 4 * rows * size + 4 * rows, "op", _CUDNN, estimate=True),
    ]


def safe_softmax(call: OperatorCall) -> list[Workspace]:
    """The softmax before its fully masked rows are replaced, and the masks that find those rows.

    Source: _safe_softmax in aten/src/ATen/native/transformers/attention.cpp, a revision after 2.5.
    """
    scores = call.tensor("self")
    result = TensorMeta(scores.shape, call.get("dtype") or scores.dtype)
    sizes = {
        "softmax": result.size_bytes,
        "minus infinity": result.item_bytes,
        "masked": scores.numel,
        "masked rows": scores.numel // max(scores.shape[call.get("dim")], 1),
        "zero": result.item_bytes,
    }
    source = "aten/src/ATen/native/transformers/attention.cpp"
    return [Workspace(name, size, "op", source, before_outputs=True) for name, size in sizes.items()]


def efficient_forward(call: OperatorCall) -> list[Workspace]:
    """An fp32 accumulator of the output, if the dtype has 16 bits and a head is larger than 128.

    Source: _efficient_attention_forward in attention.cu and kNeedsOutputAccumulatorBuffer in
        mem_eff_attention/kernel_forward.h, 2.6.0.
    """
    query, value = call.tensor("query"), call.tensor("value")
    if query.item_bytes != 2 or max(query.shape[-1], value.shape[-1]) <= 128:
        return []
    batch, heads, queries = query.shape[:3]
    return [Workspace("output accumulator", 4 * batch * queries * heads * value.shape[-1], "op", _EFFICIENT)]


def efficient_backward(call: OperatorCall) -> list[Workspace]:
    """Row sums of dO · O, and the kernel's staging memory for dQ, and for dK and dV where registers cannot hold them.

    With grouped heads (2.15), the source applies only in part, so the sizes are estimates.

    Source: _efficient_attention_backward in attention_backward.cu and workspace_size in
        mem_eff_attention/kernel_backward.h, 2.6.0.
    """
    query, key, value, grad = (call.tensor(name) for name in ("query", "key", "value", "grad_out_"))
    (batch, heads, queries, size), (key_heads, keys), value_size = query.shape, key.shape[1:3], value.shape[-1]
    kernel = _efficient_kernel(call, max(size, value_size))
    if kernel is None:
        return []
    block_i, block_j, no_staged_keys, row_sums_in_kernel = kernel
    rows = batch * heads * queries
    taken = contiguous_copy("grad_out", grad.transposed(1, 2), _BACKWARD)
    passing: dict[str, int] = {}
    if not row_sums_in_kernel:
        passing = dict.fromkeys(("fp32 dO", "fp32 O"), 4 * rows * value_size) if query.item_bytes == 2 else {}
        passing["dO·O"] = 4 * rows * value_size
        if 1 not in (heads, queries):
            passing["row sums by query"] = 4 * rows
    for name, size_bytes in {**passing, "row sums of dO·O": 4 * rows}.items():
        taken.append(Workspace(name, size_bytes, "op", _BACKWARD))
    splits = 1
    if not call.settings.deterministic and call.device.capability >= (7, 0):
        splits = -(-keys // block_j)
        if batch * heads >= 256 and keys <= 2 * block_j:
            splits = 1
        if not no_staged_keys:
            splits = max(1, min(splits, 200 // (batch * heads)))
    staged_keys = (
        0 if no_staged_keys else splits * block_j * (rounded_up(size, block_i) + rounded_up(value_size, block_i))
    )
    # On Pascal, whose kernel does not split the keys, an fp32 gradient needs no staging.
    staged = call.device.capability >= (7, 0) or query.item_bytes == 2
    tiles = -(-queries // block_i) * -(-size // block_j) if staged else 0
    size_bytes = 4 * batch * heads * rounded_up(staged_keys + tiles * (4 + block_i * block_j), 4)
    if size_bytes:
        taken.append(Workspace("staging of dQ, dK and dV", size_bytes, "op", _BACKWARD, frees=tuple(passing)))
    certain = key_heads == heads and limits(call.device).exact
    return taken if certain else [workspace.uncertain() for workspace in taken]


def _efficient_kernel(call: OperatorCall, size: int) -> tuple[int, int, bool, bool] | None:
    """The first backward kernel that fits the device; None: no kernel exists (bfloat16 before Ampere).

    Returns:
        Queries per thread block, keys per thread block, whether dK and dV need no staging, and whether the kernel
        computes the row sums itself.

    Source: dispatch_cutlassB in mem_eff_attention/kernels/cutlassB.h, kOutputInRF and kKernelComputesDelta in
        kernel_backward.h, 2.6.0; the kernels' shared memory, compared with the device's, from the library of 2.13.0
        (that of 2.6.0 has the same values for compute capability 8.0).
    """
    query = call.tensor("query")
    capability, shared = call.device.capability, limits(call.device).shared_bytes_per_block
    dropout = call.get("dropout_p", 0.0) > 0
    if query.item_bytes != 2:
        large = capability >= (8, 0) and size > 64 and shared >= 121_344
        return (128 if large else 64), 64, True, False
    if query.dtype == "bfloat16" and capability < (8, 0):
        return None
    if size <= 64:
        return 64, 64, True, True
    if capability < (7, 0):
        return 64, 64, False, True
    if size <= 96 and capability >= (8, 0) and not dropout:
        return 128, 64, True, True
    if size <= 128:
        if capability < (8, 0):
            return 128, 64, True, True
        needed = (162_304 if dropout else 154_112) if query.dtype == "float16" else (152_064 if dropout else 133_632)
        return (128, 128, True, True) if shared >= needed else (64, 64, False, True)
    return 128, 64, False, capability >= (7, 5)
