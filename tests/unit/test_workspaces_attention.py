"""Memory taken inside attention kernels: expected sizes are derived from shapes, as the cited sources compute them."""

from __future__ import annotations

from typing import Any

import pytest

from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_call import KernelSettings, TensorMeta
from memscope.simulation.cuda.workspaces import workspaces_for
from memscope.simulation.devices.catalogue import get_device

FORWARD = "aten._scaled_dot_product_{}_attention.default"
BACKWARD = "aten._scaled_dot_product_{}_attention_backward.default"


def meta(*shape: int, dtype: str, strides: tuple[int, ...] | None = None) -> TensorMeta:
    return TensorMeta(shape, dtype, strides)


def call(
    op: str,
    arguments: dict[str, Any],
    device: str = "a100-40gb",
    version: tuple[int, int] = (2, 13),
    settings: KernelSettings | None = None,
) -> list[Workspace]:
    return workspaces_for(op, arguments, get_device(device), version, settings)


def taken(op: str, arguments: dict[str, Any], **where: Any) -> dict[str, int]:
    return {workspace.name: workspace.size_bytes for workspace in call(op, arguments, **where)}


def attention(
    batch: int, heads: int, seq: int, size: int, dtype: str = "bfloat16", kv_heads: int = 0
) -> dict[str, Any]:
    """Arguments of a backward whose gradient and output have the layout [batch, seq, heads, size]."""
    laid = (seq * heads * size, size, heads * size, 1)
    query = meta(batch, heads, seq, size, dtype=dtype, strides=laid)
    key = meta(batch, kv_heads or heads, seq, size, dtype=dtype)
    return {"grad_out": query, "grad_out_": query, "query": query, "key": key, "value": key, "out": query}


def test_flash_forward_of_a_training_step_splits_nothing() -> None:
    # 32 heads × 7 blocks of 64 queries = 224 ≥ 0.8 × 2 × 108 multiprocessors
    assert taken(FORWARD.format("flash"), attention(1, 32, 405, 128)) == {}


def test_flash_forward_of_few_blocks_splits_the_keys() -> None:
    # 4 heads × 1 block of queries for 2 × 108 half multiprocessors, 8 blocks of 128 keys. They never fill one wave,
    # so that occupancy grows with the splits: 8 are best, 4 reach half of that, and 5 to 7 are no shorter than 4.
    query, key = meta(1, 4, 64, 128, dtype="float16"), meta(1, 4, 1024, 128, dtype="float16")
    arguments: dict[str, Any] = {"query": query, "key": key, "value": key}
    rows = 8 * 1 * 4 * 64
    expected = {"log-sum-exp of each split": rows * 4, "output of each split": rows * 128 * 4}
    assert taken(FORWARD.format("flash"), arguments) == expected
    assert taken(FORWARD.format("flash"), {**arguments, "dropout_p": 0.1}) == {}


def test_flash_backward_accumulates_dq_in_fp32() -> None:
    sizes = taken(BACKWARD.format("flash"), attention(2, 32, 405, 128))
    assert sizes == {"row sums of dO·O": 2 * 32 * 512 * 4, "dQ accumulator": 2 * 512 * 32 * 128 * 4}


def test_flash_backward_of_grouped_heads_expands_dk_and_dv() -> None:
    sizes = taken(BACKWARD.format("flash"), attention(1, 32, 512, 128, kv_heads=8))
    assert sizes["dK of every head"] == sizes["dV of every head"] == 512 * 32 * 128 * 2
    assert sizes["dQ accumulator"] == 512 * 32 * 128 * 4


def test_deterministic_flash_backward_has_an_accumulator_for_each_group_of_blocks() -> None:
    sizes = taken(BACKWARD.format("flash"), attention(1, 32, 512, 128), settings=KernelSettings(deterministic=True))
    assert sizes["dQ accumulator"] == 4 * (512 * 32 * 128 * 4)  # ⌈108 multiprocessors / 32 heads⌉ = 4


@pytest.mark.parametrize(("version", "rounded"), [((2, 10), 160), ((2, 11), 192)])
def test_flash_head_size_is_rounded_up(version: tuple[int, int], rounded: int) -> None:
    op = BACKWARD.format("flash")
    assert taken(op, attention(1, 1, 128, 160), version=version)["dQ accumulator"] == 128 * rounded * 4
    assert taken(op, attention(1, 1, 128, 80), version=version)["dQ accumulator"] == 128 * 96 * 4


def test_flash_backward_copies_a_gradient_with_another_layout() -> None:
    arguments = {**attention(1, 32, 512, 128), "grad_out": meta(1, 32, 512, 128, dtype="bfloat16")}
    found = call(BACKWARD.format("flash"), arguments)
    assert (found[0].name, found[0].size_bytes, found[0].before_outputs) == (
        "contiguous copy of grad_out", 32 * 512 * 128 * 2, True,
    )  # fmt: skip


def test_efficient_backward_in_fp32_stages_dq_only() -> None:
    rows = 32 * 512
    op = BACKWARD.format("efficient")
    found = call(op, attention(1, 32, 512, 128, dtype="float32"))
    # A100: kernel of 128 queries × 64 keys; 4 × 2 tiles of 4 + 128·64 floats for each head.
    assert {workspace.name: workspace.size_bytes for workspace in found} == {
        "dO·O": rows * 128 * 4,
        "row sums by query": rows * 4,
        "row sums of dO·O": rows * 4,
        "staging of dQ, dK and dV": 32 * (4 * 2 * (4 + 128 * 64)) * 4,
    }
    assert found[-1].frees == ("dO·O", "row sums by query")
    # An L4 has 99 KiB of shared memory: 64 × 64, hence 8 × 2 smaller tiles.
    on_l4 = call(op, attention(1, 32, 512, 128, dtype="float32"), device="l4")
    assert on_l4[-1].size_bytes == 32 * (8 * 2 * (4 + 64 * 64)) * 4


def test_efficient_backward_in_16_bits_stages_what_registers_do_not_hold() -> None:
    op = BACKWARD.format("efficient")
    # A100: 128 × 128 with dK and dV in registers; 4 × 1 tiles.
    sizes = taken(op, attention(1, 32, 512, 128))
    assert sizes == {"row sums of dO·O": 32 * 512 * 4, "staging of dQ, dK and dV": 32 * (4 * (4 + 128 * 128)) * 4}
    # L4: 64 × 64; keys in min(8, 200 // 32) = 6 parts, each staging 64 × 128 of dK and of dV; 8 × 2 tiles.
    sizes = taken(op, attention(1, 32, 512, 128), device="l4")
    assert sizes["staging of dQ, dK and dV"] == 32 * (6 * 64 * (128 + 128) + 8 * 2 * (4 + 64 * 64)) * 4
    # T4: 128 × 64 with dK and dV in registers; 4 × 2 tiles.
    sizes = taken(op, attention(1, 32, 512, 128, dtype="float16"), device="t4")
    assert sizes["staging of dQ, dK and dV"] == 32 * (4 * 2 * (4 + 128 * 64)) * 4


def test_efficient_forward_accumulates_large_heads_in_fp32() -> None:
    op = FORWARD.format("efficient")
    assert taken(op, attention(1, 32, 512, 128)) == {}
    assert taken(op, attention(1, 32, 512, 256)) == {"output accumulator": 32 * 512 * 256 * 4}
    assert taken(op, attention(1, 32, 512, 256, dtype="float32")) == {}


def test_cudnn_backward_accumulates_dq_and_row_sums_in_one_buffer_that_is_an_estimate() -> None:
    arguments = attention(1, 32, 405, 128)
    rows = 1 * 32 * 405
    found = call(BACKWARD.format("cudnn"), arguments, device="h100-80gb")
    assert [(workspace.name, workspace.size_bytes, workspace.estimate) for workspace in found] == [
        ("cuDNN attention workspace", rows * 128 * 4 + rows * 4, True)
    ]


def test_cudnn_backward_copies_a_gradient_whose_rows_have_gaps() -> None:
    expanded = meta(1, 32, 405, 128, dtype="bfloat16", strides=(0, 0, 0, 0))
    sizes = taken(BACKWARD.format("cudnn"), {**attention(1, 32, 405, 128), "grad_out": expanded})
    assert sizes["copy of grad_out"] == 32 * 405 * 128 * 2


def test_safe_softmax_holds_the_softmax_and_a_byte_for_each_score() -> None:
    scores = meta(2, 4, 32, 32, dtype="float32")
    assert taken("aten._safe_softmax.default", {"self": scores, "dim": -1}) == {
        "softmax": 2 * 4 * 32 * 32 * 4, "minus infinity": 4, "masked": 2 * 4 * 32 * 32, "masked rows": 2 * 4 * 32,
        "zero": 4,
    }  # fmt: skip


@pytest.mark.parametrize("op", ["memscope.flash_attn_2_backward", "flash_attn._flash_attn_backward"])
def test_the_package_flash_attn_rounds_heads_above_128_to_64_values(op: str) -> None:
    q = meta(2, 100, 8, 160, dtype="bfloat16")
    rows, size = 2 * 8 * 128, 192
    accumulators = 7  # deterministic: 108 multiprocessors for 2 samples of 8 heads, 6.75
    expected = {"row sums of dO·O": rows * 4, "dQ accumulator": accumulators * rows * size * 4}
    assert taken(f"{op}.default", {"dout": q, "q": q, "k": q, "v": q, "deterministic": True}) == expected


def test_flash_attention_3_has_other_blocks_without_a_mask() -> None:
    q = meta(1, 100, 8, 128, dtype="bfloat16")
    arguments: dict[str, Any] = {"q": q, "k": q, "v": q, "max_seqlen_q": 100, "max_seqlen_k": 100}
    blocks = {True: 64, False: 80}  # queries of a thread block
    for causal, block in blocks.items():
        rows = 8 * -(-100 // block) * block
        found = taken("memscope.flash_attn_3_backward.default", {**arguments, "causal": causal}, device="h100-80gb")
        assert found["dQ accumulator"] == rows * 128 * 4
        assert found["semaphores of dQ"] == 8 * -(-100 // block) * 4
