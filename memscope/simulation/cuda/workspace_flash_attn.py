"""Workspaces of the package FlashAttention, 2 and 3: read in its source, never measured by us.

Queries, keys and values are `[batch, seq, heads, head size]`, or `[tokens, heads, head size]` where samples are packed
by length (`cu_seqlens_q` is given). Sources: csrc/flash_attn/flash_api.cpp and hopper/flash_api.cpp of
Dao-AILab/flash-attention 2.8.3.
"""

from __future__ import annotations

from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_attention import rounded_up, split_keys
from memscope.simulation.cuda.workspace_call import OperatorCall, TensorMeta

__all__ = ["flash_attn_2_backward", "flash_attn_2_forward", "flash_attn_3_backward", "flash_attn_3_forward"]

_TWO = "csrc/flash_attn/flash_api.cpp"
_THREE = "hopper/flash_api.cpp"


def _head_size_2(size: int) -> int:
    return rounded_up(size, 32 if size <= 128 else 64)


def flash_attn_2_forward(call: OperatorCall) -> list[Workspace]:
    """Accumulators of a split-KV run; packed samples are split in inference only (mha_varlen_fwd)."""
    if call.get("cu_seqlens_q") is not None:
        return []
    query, key = call.tensor("q").transposed(1, 2), call.tensor("k").transposed(1, 2)
    return split_keys(call, query, key, _head_size_2(query.shape[-1]), _TWO)


def flash_attn_2_backward(call: OperatorCall) -> list[Workspace]:
    """fp32 accumulator of dQ, row sums of dO · O, and, where heads are grouped, dK and dV of every query head.

    A deterministic run has one accumulator of dQ for each group of thread blocks. Packed samples lie 128 rows apart.
    """
    query, key = call.tensor("q"), call.tensor("k")
    heads, size = query.shape[-2:]
    batch, rows = _batch_and_rows(call, 128)
    accumulators = -(-call.device.multiprocessors // (batch * heads)) if call.get("deterministic") else 1
    expanded = TensorMeta((*key.shape[:-2], heads, size), query.dtype).size_bytes
    return [
        Workspace("row sums of dO·O", 4 * heads * rows, "op", _TWO),
        Workspace("dQ accumulator", 4 * accumulators * heads * rows * _head_size_2(size), "op", _TWO),
        *(Workspace(f"{name} of every head", expanded, "op", _TWO) for name in ("dK", "dV") if key.shape[-2] != heads),
    ]


def _batch_and_rows(call: OperatorCall, block: int) -> tuple[int, int]:
    """Number of samples, and rows of the buffers of FlashAttention-2's backward pass for each head."""
    query, begins = call.tensor("q"), call.get("cu_seqlens_q")
    if begins is None:
        return query.shape[0], query.shape[0] * rounded_up(query.shape[1], block)
    batch = begins.shape[0] - 1
    return batch, query.shape[0] + batch * block


def flash_attn_3_forward(call: OperatorCall) -> list[Workspace]:
    """The scheduler's counter, and for packed samples one number each (up to 992 of them); keys are not split."""
    begins = call.get("cu_seqlens_q")
    varlen = begins is not None
    masked = call.get("causal") or call.get("window_left", -1) >= 0 or call.get("window_right", -1) >= 0
    batch = begins.shape[0] - 1 if varlen else 0
    numbers = int(bool(masked) or varlen) + (batch if batch <= 992 else 0)
    return [Workspace("counters of the scheduler", 4 * numbers, "op", _THREE)] if numbers else []


def flash_attn_3_backward(call: OperatorCall) -> list[Workspace]:
    """fp32 accumulators of dQ and, where heads are grouped, of dK and dV; row sums, log-sum-exp and semaphores.

    Sizes are rounded to the blocks of the kernels for compute capability 9.0.
    """
    query, key = call.tensor("q"), call.tensor("k")
    heads, size, key_heads = *query.shape[-2:], key.shape[-2]
    width = next(rounded for rounded in (64, 96, 128, 192, 256) if size <= rounded)
    queries, keys = _blocks_3(call, width)
    rows, batch = _rows_3(query, call.get("cu_seqlens_q"), queries)
    key_rows, _ = _rows_3(key, call.get("cu_seqlens_k"), keys)
    found = [
        Workspace("row sums of dO·O", 4 * heads * rows, "op", _THREE),
        Workspace("log-sum-exp, base 2", 4 * heads * rows, "op", _THREE),
        Workspace("dQ accumulator", 4 * heads * rows * width, "op", _THREE),
    ]
    if key_heads != heads:
        accumulator = 4 * key_heads * key_rows * width
        found += [Workspace(f"{name} accumulator", accumulator, "op", _THREE) for name in ("dK", "dV")]
    semaphores = 4 * -(-call.get("max_seqlen_q") // queries) * batch * heads
    found.append(Workspace("semaphores of dQ", semaphores, "op", _THREE))
    if key_heads != heads and call.get("deterministic"):
        semaphores = 4 * -(-call.get("max_seqlen_k") // keys) * batch * key_heads
        found += [Workspace(f"semaphores of {name}", semaphores, "op", _THREE) for name in ("dK", "dV")]
    return found


def _blocks_3(call: OperatorCall, width: int) -> tuple[int, int]:
    """Queries and keys of a thread block: kBlockM_sm90 and kBlockN_sm90 in mha_bwd."""
    causal, softcap = bool(call.get("causal")), call.get("softcap", 0.0) > 0
    masked = causal or call.get("window_left", -1) >= 0 or call.get("window_right", -1) >= 0
    if width <= 64:
        return (96 if causal and softcap else 128), 128
    if width <= 128:
        return (80 if width == 128 and not (masked or softcap) else 64), 128
    return 64, 96 if width <= 192 else 80


def _rows_3(tensor: TensorMeta, begins: TensorMeta | None, block: int) -> tuple[int, int]:
    """Rows of a buffer for each head, and number of samples."""
    if begins is None:
        return tensor.shape[0] * rounded_up(tensor.shape[1], block), tensor.shape[0]
    batch = begins.shape[0] - 1
    return rounded_up(tensor.shape[0] + batch * block, block), batch
