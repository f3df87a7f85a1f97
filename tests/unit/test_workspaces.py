"""Memory taken inside CUDA kernels: expected sizes are derived from shapes, as the cited sources compute them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from memscope.errors import UsageError
from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_call import KernelSettings, TensorMeta, describe
from memscope.simulation.cuda.workspaces import NOT_MODELLED, OPERATORS, workspaces_for
from memscope.simulation.devices.catalogue import get_device

KIB, MIB = 2**10, 2**20
POOL = 2 * 4096 * KIB + 8 * 16 * KIB  # ":4096:2:16:8"
OF_PYTORCH = {name for name in OPERATORS if name.startswith("aten.")}
"""The others are of FlashAttention's package and its stand-in: see test_flash_attn.py."""
A100, H100 = get_device("a100-40gb"), get_device("h100-80gb")


def meta(*shape: int, dtype: str = "float32", strides: tuple[int, ...] | None = None) -> TensorMeta:
    return TensorMeta(shape, dtype, strides)


def taken(op: str, device: str = "a100-40gb", version: tuple[int, int] = (2, 13), **arguments: Any) -> dict[str, int]:
    settings = arguments.pop("settings", None)
    found = workspaces_for(op, arguments, get_device(device), version, settings)
    sizes = {workspace.name: workspace.size_bytes for workspace in found}
    assert len(sizes) == len(found)
    return sizes


def lifetimes(found: list[Workspace]) -> list[tuple[str, str, int]]:
    return [(workspace.lifetime, workspace.key, workspace.size_bytes) for workspace in found]


MATRICES: dict[str, Any] = {"self": meta(405, 4096), "mat2": meta(4096, 4096)}
LINEAR: dict[str, Any] = {"self": meta(4096), "mat1": meta(405, 4096), "mat2": meta(4096, 4096, strides=(1, 4096))}


# Matrix products


@pytest.mark.parametrize(
    ("device", "version", "size_bytes"),
    [
        ("a100-40gb", (2, 6), 8_519_680),
        ("a100-40gb", (2, 14), 8_519_680),
        ("h100-80gb", (2, 6), 33_554_432),
        ("t4", (2, 13), 8_519_680),
        ("gpu", (2, 13), 8_519_680),
    ],
)
def test_cublas_keeps_one_workspace_for_each_thread(device: str, version: tuple[int, int], size_bytes: int) -> None:
    found = workspaces_for("aten.mm.default", MATRICES, get_device(device), version)
    assert lifetimes(found) == [("handle", "cublas", size_bytes)]
    assert POOL == 8_519_680


def test_from_2_15_on_each_product_takes_and_frees_its_workspace() -> None:
    found = workspaces_for("aten.mm.default", MATRICES, H100, (2, 15))
    assert lifetimes(found) == [("op", "", 32 * MIB)]
    kept = workspaces_for("aten.mm.default", MATRICES, H100, (2, 15), KernelSettings(cached=True))
    assert lifetimes(kept) == [("handle", "cublas", 32 * MIB)]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((2, 6), [("op", "", MIB), ("handle", "cublas", POOL)]),
        ((2, 8), [("op", "", MIB), ("handle", "cublas", POOL)]),
        ((2, 9), [("handle", "cublas", POOL), ("handle", "cublaslt", MIB)]),
        ((2, 11), [("handle", "cublas", POOL), ("handle", "cublaslt", MIB)]),
        ((2, 12), [("handle", "cublas", POOL)]),
        ((2, 14), [("handle", "cublas", POOL)]),
        ((2, 15), [("op", "", MIB)]),
    ],
)
def test_a_linear_layer_with_bias_goes_through_cublaslt(version: tuple[int, int], expected: list[Any]) -> None:
    assert lifetimes(workspaces_for("aten.addmm.default", LINEAR, A100, version)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.5},
        {"self": meta(405, 4096)},
        {"self": meta(4096, strides=(2,))},
        {"self": meta(1), "mat2": meta(4096, 1)},
        {"mat1": meta(1, 4096)},
    ],
)
def test_other_addmm_goes_through_cublas(change: dict[str, Any]) -> None:
    found = workspaces_for("aten.addmm.default", {**LINEAR, **change}, A100, (2, 15))
    assert lifetimes(found) == [("op", "", POOL)]


def test_environment_variables_set_workspaces() -> None:
    settings = KernelSettings.from_environment(
        {"CUBLAS_WORKSPACE_CONFIG": ":16:8:4096:1", "CUBLASLT_WORKSPACE_SIZE": "2048", "DISABLE_ADDMM_CUDA_LT": "0"}
    )
    found = workspaces_for("aten.addmm.default", LINEAR, A100, (2, 11), settings)
    assert lifetimes(found) == [("handle", "cublas", (8 * 16 + 4096) * KIB), ("handle", "cublaslt", 2 * MIB)]
    apart = KernelSettings.from_environment({"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0"})
    assert lifetimes(workspaces_for("aten.addmm.default", LINEAR, A100, (2, 13), apart)) == [
        ("handle", "cublaslt", MIB)
    ]
    without = KernelSettings.from_environment({"DISABLE_ADDMM_CUDA_LT": "1"})
    assert lifetimes(workspaces_for("aten.addmm.default", LINEAR, A100, (2, 6), without)) == [
        ("handle", "cublas", POOL)
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", "4096", "expected :SIZE:COUNT with SIZE in KiB, such as :4096:8"),
        ("CUBLASLT_WORKSPACE_SIZE", "1M", "expected a whole number of KiB, such as 1024"),
        ("TORCH_CUBLAS_WORKSPACE_CACHE", "yes", "expected 0 or 1"),
    ],
)
def test_an_unreadable_variable_is_named(name: str, value: str, expected: str) -> None:
    with pytest.raises(UsageError, match=f'{name}="{value}": {expected}'):
        KernelSettings.from_environment({name: value})


def test_an_operand_cublas_cannot_read_is_copied() -> None:
    expanded = meta(405, 4096, strides=(0, 0))  # the gradient of a sum
    sizes = taken("aten.mm.default", self=expanded, mat2=meta(4096, 16, strides=(1, 4096)))
    assert sizes == {"contiguous copy of self": 405 * 4096 * 4, "cuBLAS workspace": POOL}
    heads = meta(
        32, 405, 128, dtype="bfloat16", strides=(128, 4096, 1)
    )  # [seq, heads, 128] seen by head: read in place
    every_second = meta(32, 128, 405, dtype="bfloat16", strides=(51840, 810, 2))
    sizes = taken("aten.bmm.default", self=heads, mat2=every_second)
    assert sizes == {"contiguous copy of mat2": 32 * 128 * 405 * 2, "cuBLAS workspace": POOL}


def test_an_empty_product_and_a_cpu_take_nothing() -> None:
    assert taken("aten.mm.default", self=meta(0, 4096), mat2=meta(4096, 16)) == {}
    assert taken("aten.mm.default", device="cpu", **MATRICES) == {}


# Indices


def embedding(tokens: int, **changes: Any) -> list[Workspace]:
    arguments = {
        "grad_output": meta(1, tokens, 4096), "indices": meta(1, tokens, dtype="int64"), "num_weights": 32000,
        "padding_idx": -1, "scale_grad_by_freq": False, **changes,
    }  # fmt: skip
    return workspaces_for("aten.embedding_dense_backward.default", arguments, A100, (2, 13))


def test_embedding_gradient_of_3072_tokens_needs_no_sort() -> None:
    assert embedding(3072) == []
    assert embedding(3073) != []


def test_embedding_gradient_of_more_tokens_sums_segments_in_fp32() -> None:
    found = embedding(4096, grad_output=meta(1, 4096, 4096, dtype="bfloat16"))
    segments = 4096 // 10 + min(4096, 32000)
    assert [(workspace.name, workspace.size_bytes) for workspace in found] == [
        ("sorted indices", 4096 * 8),
        ("original positions", 4096 * 8),
        ("range", 4096 * 8),
        ("sort scratch", 2 * 4096 * 8),
        ("segment offsets", 4096 * 8),
        ("number of segments", 8),
        ("partials per segment", 4096 * 8),
        ("offsets of partials", 4096 * 8),
        ("number of partials", 8),
        ("partial segment offsets", segments * 8),
        ("sum of each partial", segments * 4096 * 4),
    ]
    assert [workspace.name for workspace in found if workspace.estimate] == ["sort scratch"]
    assert [workspace.name for workspace in found if workspace.before_outputs] == [w.name for w in found[:4]]
    assert found[4].frees == ("range", "sort scratch")


def test_embedding_of_few_rows_adds_atomically_from_2_11_on() -> None:
    # 100 rows: 100 blocks < 4 × 108, and 10000 // 10 + 100 = 1100 partials > 4 × 100.
    few: dict[str, Any] = {
        "grad_output": meta(10000, 1024, dtype="float16"), "indices": meta(10000, dtype="int64"), "num_weights": 100,
        "scale_grad_by_freq": False,
    }  # fmt: skip
    sizes = taken("aten.embedding_dense_backward.default", **few)
    assert sizes["segment of each partial"] == 1100 * 8
    assert sizes["fp32 gradient of the weight"] == 100 * 1024 * 4
    assert "sum of each partial" not in sizes
    cases: list[dict[str, Any]] = [{"version": (2, 9)}, {"settings": KernelSettings(deterministic=True)}]
    for unfused in cases:
        sizes = taken("aten.embedding_dense_backward.default", **few, **unfused)
        assert sizes["sum of each partial"] == 1100 * 1024 * 4


def test_adding_at_indices_sorts_the_indices() -> None:
    arguments: dict[str, Any] = {
        "self": meta(32000, 64),
        "indices": (meta(500, dtype="int64"),),
        "values": meta(500, 64),
    }
    found = workspaces_for("aten.index_put_.default", {**arguments, "accumulate": True}, A100, (2, 13))
    assert [workspace.size_bytes for workspace in found] == [4000, 4000, 4000, 4000, 4000, 1]
    assert found[2].frees == ("indices in range",)
    assert taken("aten.index_put_.default", **arguments) == {}
    one = {**arguments, "values": meta(64), "accumulate": True}
    assert taken("aten.index_put_.default", **one)["contiguous copy of values"] == 500 * 64 * 4
    by_columns = {**arguments, "values": meta(500, 64, strides=(1, 500)), "accumulate": True}
    found = workspaces_for("aten.index_put_.default", by_columns, A100, (2, 6))
    assert [workspace.size_bytes for workspace in found] == [4000, 4000, 500 * 64 * 4, 4000, 4000, 4000, 1]
    assert not any(workspace.before_outputs for workspace in found)


def test_more_than_2304_indices_are_sorted_with_second_buffers() -> None:
    # One block sorts 256 × 9 keys of 8 bytes. Beyond, second buffers of keys and values are most of the bytes measured
    # on GPUs: 72,191 bytes for 4096 (Wedsonlin/assignment2-systems) and 138,751 for 8192 (MAGMA27/assignment2-systems).
    for count, size_bytes in ((2304, 1), (2305, 36_880), (4096, 65_536), (8192, 131_072)):
        arguments = {"self": meta(32000, 64), "indices": (meta(count, dtype="int64"),), "values": meta(count, 64)}
        assert taken("aten.index_put.default", accumulate=True, **arguments)["sort scratch"] == size_bytes


# Sums


def test_gradient_of_a_bias_over_2048_tokens_stages_64_mib() -> None:
    # 4 outputs per thread: blocks of 32 × 4 threads; 2048 / 4 = 512 values per thread. 16 blocks fit on each of the 108
    # multiprocessors, and there are 1024 / 32 = 32: min(⌈1728 / 32⌉, ⌈512 / 16⌉) = 32 parts.
    # Staged are 4096 outputs × 32 parts × (32 × 4) floats.
    sizes = taken("aten.sum.dim_IntList", self=meta(1, 2048, 4096), dim=(0, 1))
    assert sizes == {"sums of thread blocks": 4096 * 32 * (32 * 4) * 4, "semaphores": 32 * 4}
    assert sizes["sums of thread blocks"] == 64 * MIB


def test_rows_stored_column_by_column_are_reduced_in_parts() -> None:
    # Measured on an H100 with PyTorch 2.6 (kkaitlyn111/cs336-a2-systems, memory_ctx128_fullstep_.pickle): 512 rows of
    # 10,000 logits whose rows lie side by side take 164,626,432 bytes for the maximum, and 41,156,608 for the sum.
    # 4 outputs a thread: blocks of 32 × 4 threads, 10000 / 4 = 2500 values a thread; 4 blocks for 512 outputs, and
    # 132 × 2048 / 128 = 2112 fit: min(2112 / 4, ⌈2500 / 16⌉) = 157 parts, of 16 bytes (value, place) or of 4.
    logits = meta(512, 10_000, strides=(1, 512))
    for op, item_bytes, dim in (("max.dim", 16, -1), ("min.dim", 16, 1), ("sum.dim_IntList", 4, (-1,))):
        sizes = taken(f"aten.{op}", "h100-80gb", self=logits, dim=dim, keepdim=True)
        assert sizes == {"sums of thread blocks": 512 * 157 * (32 * 4) * item_bytes, "semaphores": 4 * 4}
    assert (512 * 157 * 128 * 16, 512 * 157 * 128 * 4) == (164_626_432, 41_156_608)


def test_contiguous_rows_are_reduced_without_a_workspace() -> None:
    # 10000 / 512 threads = 20 values per thread. Confirmed on an A10 or similar: Wedsonlin's medium_128_training.
    for op, dim in (("max.dim", -1), ("sum.dim_IntList", (-1,))):
        assert taken(f"aten.{op}", self=meta(4, 128, 10_000), dim=dim, keepdim=True) == {}
    assert taken("aten.max.default", self=meta(4, 128, 10_000)) == {}
    gaps = meta(512, 10_000, strides=(1, 1024))
    assert taken("aten.max.dim", "h100-80gb", self=gaps, dim=-1) == {}


def test_the_base_of_a_power_is_put_on_the_device() -> None:
    assert taken("aten.pow.Scalar", self=10000, exponent=meta(32)) == {"base": 8}
    assert taken("aten.pow.Scalar", self=1, exponent=meta(32)) == {}
    assert taken("aten.pow.Tensor_Scalar", self=meta(32), exponent=2) == {}


def test_gradient_of_a_bias_over_405_tokens_stages_nothing() -> None:
    # 405 / 4 = 102 values a thread, fewer than 256.
    assert taken("aten.sum.dim_IntList", self=meta(405, 4096), dim=(0,)) == {}


def test_sum_of_everything_stages_one_float_for_each_part() -> None:
    # Blocks of 512 threads: 405·4096 / 512 = 3240 values a thread; min(108·4, ⌈3240 / 16⌉) = 203 parts.
    sizes = taken("aten.sum.default", self=meta(405, 4096, dtype="bfloat16"))
    assert sizes == {"sums of thread blocks": 203 * 4, "semaphores": 4}


def test_sum_of_more_than_2_gib_goes_in_parts_and_is_an_estimate() -> None:
    at_the_limit, beyond = meta(2**19 - 1, 1024), meta(2**19, 1024)  # 4 bytes an element: 2 GiB
    for values, estimate in ((at_the_limit, False), (beyond, True)):
        found = workspaces_for("aten.sum.default", {"self": values}, A100, (2, 13))
        assert [workspace.estimate for workspace in found] == [estimate, estimate]


def test_mean_over_a_row_stages_nothing() -> None:
    assert taken("aten.mean.dim", self=meta(405, 4096), dim=(-1,)) == {}


def test_foreach_norm_has_a_partial_for_each_chunk_of_the_longest_tensor() -> None:
    tensors = (meta(32000, 4096, dtype="bfloat16"), meta(4096, dtype="bfloat16"), meta(4096, 4096, dtype="bfloat16"))
    assert taken("aten._foreach_norm.Scalar", self=tensors) == {"norms of chunks": 3 * 2000 * 4}  # 32000·4096 / 65536
    assert taken("aten._foreach_norm.Scalar", self=(meta(8), meta(8, dtype="float16"))) == {}


def test_norm_over_many_short_rows_sums_its_weight_gradient_in_parts() -> None:
    arguments: dict[str, Any] = {"input": meta(131072, 768), "normalized_shape": (768,), "weight": meta(768)}
    parts = min(32768 // 24, 131072 // 32)
    op = "aten.native_layer_norm_backward.default"
    assert taken(op, **arguments) == {
        "partial weight gradients": parts * 768 * 4, "partial bias gradients": parts * 768 * 4,
    }  # fmt: skip
    assert taken(op, version=(2, 7), **arguments) == {}
    assert taken(op, **{**arguments, "input": meta(65536, 768)}) == {}
    assert (
        taken(op, **{**arguments, "normalized_shape": (4096,), "weight": meta(4096), "input": meta(131072, 4096)}) == {}
    )


# The table as a whole


def test_arguments_are_named_as_in_pytorchs_schemas() -> None:
    x, w, i = (torch.empty(*shape, device="meta") for shape in ((405, 16), (16, 8), (405,)))
    q = torch.empty(1, 4, 64, 32, device="meta", dtype=torch.float16)
    indices, aten, every = i.long(), torch.ops.aten, [True]
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.mm.default, (x, w)), (aten.addmm.default, (w[0], x, w)), (aten._addmm_activation.default, (w[0], x, w)),
        (aten.bmm.default, (x[None], w[None])), (aten.baddbmm.default, (x[None], x[None], w[None])),
        (aten.mv.default, (x, w[:, 0])), (aten.addmv.default, (i, x, w[:, 0])), (aten.dot.default, (i, i)),
        (aten.vdot.default, (i, i)), (aten.sum.dim_IntList, (x, [0])), (aten.mean.dim, (x, [0])),
        (aten.max.dim, (x, 0)), (aten.min.dim, (x, 0)), (aten.pow.Scalar, (2.0, x)),
        (aten._scaled_dot_product_flash_attention.default, (q, q, q)),
        (aten._scaled_dot_product_flash_attention_backward.default, (q, q, q, q, q, i, i, i, 64, 64, 0.0, True, i, i)),
        (aten._scaled_dot_product_efficient_attention.default, (q, q, q, None, True)),
        (aten._scaled_dot_product_efficient_attention_backward.default, (q, q, q, q, None, q, i, i, i, 0.0, every * 4)),
        (aten.embedding_dense_backward.default, (x, indices, 100, -1, False)),
        (aten.index_put.default, (x, [indices], x, True)), (aten.index_put_.default, (x, [indices], x, True)),
        (aten._index_put_impl_.default, (x, [None, indices], x, True)), (aten._foreach_norm.Scalar, ([x, w],)),
        (aten.native_layer_norm_backward.default, (x, x, [16], i, i, w, w, every * 3)),
        (aten._fused_rms_norm_backward.default, (x, x, [16], i, w, every * 2)),
        (aten._softmax_backward_data.default, (x, x, -1, torch.float32)), (aten._safe_softmax.default, (x, -1)),
        (aten._scaled_dot_product_cudnn_attention_backward.default, (*[q] * 6, i, i, q, i, i, 64, 64, 0.0, True)),
        (aten.mse_loss.default, (x, x)), (aten.smooth_l1_loss.default, (x, x)), (aten.huber_loss.default, (x, x)),
        (aten.binary_cross_entropy.default, (x, x)), (aten.binary_cross_entropy_with_logits.default, (x, x, None, x)),
        (aten.soft_margin_loss.default, (x, x)), (aten.soft_margin_loss_backward.default, (x, x, x, 1)),
        (aten._ctc_loss.Tensor, (q[0], x, indices, indices)),
        (aten._ctc_loss_backward.Tensor, (i, q[0], x, indices, indices, i, q[0], 0)),
        (aten._scaled_mm.default, (x[:16], x[:16], i, i)),
    ]  # fmt: skip
    assert {str(func).rpartition(".")[0] for func, _ in calls} == OF_PYTORCH
    for func, args in calls:
        workspaces_for(str(func), describe(func, args, {}), get_device("h100-80gb"), (2, 13))


def test_each_operator_is_modeled_or_listed_as_not_modeled() -> None:
    assert not OPERATORS & set(NOT_MODELLED)
    for name in {*OF_PYTORCH, *NOT_MODELLED}:
        assert hasattr(torch.ops.aten, name.removeprefix("aten.")), name
    assert all(len(reason) > 20 for reason in NOT_MODELLED.values())


def test_a_call_is_described_without_its_values() -> None:
    bias, x = torch.empty(8, dtype=torch.bfloat16), torch.empty(4, 6, dtype=torch.bfloat16)
    described = describe(
        torch.ops.aten.addmm.default, (bias, x, torch.empty(8, 6, dtype=torch.bfloat16).t()), {"beta": 2}
    )
    right = meta(6, 8, dtype="bfloat16", strides=(1, 6))
    assert described == {
        "self": meta(8, dtype="bfloat16", strides=(1,)), "mat1": meta(4, 6, dtype="bfloat16", strides=(6, 1)),
        "mat2": right, "beta": 2,
    }  # fmt: skip
    assert right.transposed(0, 1).is_contiguous
    assert not right.is_contiguous


def test_reading_the_table_does_not_load_torch() -> None:
    code = "import sys, memscope.simulation.cuda.workspaces; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
