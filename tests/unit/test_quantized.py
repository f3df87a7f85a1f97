"""Quantized weights: their layout, what their products take, and what is refused."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memscope import Workload, record, simulate
from memscope.cli.profile_runs import labels_of
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.lora import LoRA, merge
from memscope.strategies.quantized import QLoRA, checks, library
from memscope.strategies.quantized.targets import quantizable
from memscope.testing import toy_workload
from memscope.trace import CATEGORIES
from memscope.workload.quantized import scales_of
from memscope.workload.settings import help_of

WIDE, NARROW = 512, 256
ELEMENTS = WIDE * NARROW


class Two(nn.Module):
    """Two layers that are quantized, between an embedding and a head that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, NARROW), nn.LayerNorm(NARROW)
        self.layers = nn.ModuleList([nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW, bias=False)])
        self.head = nn.Linear(NARROW, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def two(rows: int = 2048, dtype: torch.dtype = torch.bfloat16) -> Workload:
    return Workload(
        model=Two() if dtype is torch.float32 else Two().to(dtype),
        batches=[torch.zeros(1, rows, dtype=torch.int64)],
        loss=lambda model, tokens: model(tokens).float().square().mean(),
        optimizer_factory=torch.optim.AdamW,
    )


def on_gpu(plan: str, device: str = "a100-80gb", **settings: Any) -> Any:
    return simulate(lambda: two(**settings), device=device, strategies=plan, steps=1)


def rows_of(trace: Any) -> list[tuple[int, ...]]:
    columns = (trace.size, trace.phase, trace.born, trace.freed, trace.category, trace.module)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def of_operator(trace: Any, text: str) -> list[int]:
    """Bytes that operators ask for whose names contain a text, in order."""
    return [int(size) for size, op in zip(trace.requested, trace.op, strict=True) if text in trace.ops[int(op)]]


@pytest.mark.parametrize("double", [True, False])
def test_the_layout_of_a_simulated_weight_is_that_of_bitsandbytes_own_quantization(double: bool) -> None:
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(WIDE, NARROW), blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    blocks = ELEMENTS // 64
    by_hand = {"absmax": blocks if double else 4 * blocks, "quant_map": 4 * 16}
    by_hand |= {"nested_absmax": 4 * blocks // 256, "nested_quant_map": 4 * 256, "nested_offset": 4} if double else {}
    sizes = {name: tensor.nbytes for name, tensor in state.as_dict().items() if isinstance(tensor, Tensor)}
    assert packed.nbytes == ELEMENTS // 2
    assert sizes | ({"nested_offset": 4} if double else {}) == by_hand

    trace = on_gpu(f"qlora:double={str(double).lower()},r=1,targets=layers.1")
    held = [
        int(size)
        for size, category, module in zip(trace.requested, trace.category, trace.module, strict=True)
        if CATEGORIES[category] == "parameter" and trace.modules[module] == "layers.1"
    ]
    lora = [4 * WIDE, 4 * NARROW]  # rank 1 in float32
    assert sorted(held) == sorted([packed.nbytes, *by_hand.values(), *lora])


@pytest.mark.parametrize("plan", ["qlora", "qlora:type=fp4,double=false", "int8,lora", "int8:threshold=0,lora"])
def test_real_weights_have_the_names_dtypes_and_shapes_of_the_simulated_ones(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layout() -> dict[str, Any]:
        workload = two(dtype=torch.float32)
        Plan.parse(plan).carry_out(workload)
        tensors = dict(workload.model.named_parameters())
        for name, module in workload.model.named_modules():
            tensors |= {f"{name}.{key}": value for key, value in scales_of(module).items()}
        return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    real = layout()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layout() == real
        without_library(monkeypatch)
        assert layout() == real


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (library, checks):
        monkeypatch.setattr(module, "is_installed", lambda: False)


@pytest.mark.parametrize(
    "plan", ["qlora", "qlora:type=fp4,double=false,compute=fp16", "int8,lora", "int8,lora,amp:dtype=bf16"]
)
def test_without_bitsandbytes_its_stand_in_makes_the_same_allocations(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = on_gpu(plan)
    without_library(monkeypatch)
    stand_in = on_gpu(plan)
    assert rows_of(stand_in) == rows_of(real)
    assert any("bitsandbytes is not installed" in note for note in stand_in.meta["notes"])
    assert not any("bitsandbytes" in note for note in real.meta.get("notes", ()))


def test_without_bitsandbytes_a_real_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    with pytest.raises(UsageError, match="pip install bitsandbytes, or simulate"):
        record(two, strategies="qlora")


def test_a_product_unpacks_its_weight_and_the_backward_pass_again() -> None:
    trace = on_gpu("qlora:targets=layers.0")
    # 2,048 rows: two products forward; backward through layers.1 alone, for the input of layers.0 needs no gradient
    assert of_operator(trace, "dequantize_4bit") == [2 * ELEMENTS] * 3  # bfloat16
    assert of_operator(trace, "dequantize_blockwise") == [4 * ELEMENTS // 64] * 3  # float32


@pytest.mark.parametrize(
    ("device", "rows", "fused"),
    [
        # 512 · 256 weights are few (below 4 Mi), in = out / 2, and 8 blocks of 64 outputs are less than a quarter wave:
        # an A100 multiplies up to 384 rows if in < out and 32 (8 · 8 blocks ≤ 108) if not, an RTX 4090 up to 32 and 23.
        ("a100-80gb", 384, 1),
        ("a100-80gb", 385, 0),
        ("a100-80gb", 32, 2),
        ("rtx4090", 32, 1),
        ("rtx4090", 33, 0),
        ("rtx4090", 23, 2),
    ],
)
def test_up_to_some_rows_the_packed_weight_is_multiplied_as_bitsandbytes_chooses(
    device: str, rows: int, fused: int
) -> None:
    trace = on_gpu("qlora:targets=layers.1", device, rows=rows)
    assert len(of_operator(trace, "memscope.gemm_4bit")) == fused


def test_norms_embedding_and_head_are_kept_in_float32() -> None:
    trace = on_gpu("qlora")
    whole = {"embed": 4 * 16 * NARROW, "head": 4 * 16 * NARROW}
    found = {
        name: int(trace.requested[(trace.module == index) & (trace.category == CATEGORIES.index("parameter"))].sum())
        for index, name in enumerate(trace.modules)
        if name in whole
    }
    assert found == whole


def test_packed_weights_count_with_their_elements() -> None:
    trace = on_gpu("qlora:r=1,targets=layers.1")
    plain = sum(parameter.numel() for parameter in Two().parameters())
    assert trace.meta["parameters"] == {"total": plain + WIDE + NARROW, "trainable": WIDE + NARROW}


def test_int8_assumes_columns_with_outliers_and_says_so() -> None:
    (assumed,) = on_gpu("int8,lora").meta["assumptions"]
    assert (assumed["what"], assumed["value"]) == ("columns of a layer's input with an outlier (LLM.int8())", "7")
    assert on_gpu("int8:threshold=0,lora").meta["assumptions"] == []


def test_the_output_head_and_tied_layers_are_not_quantized() -> None:
    model = Two()
    assert quantizable(model) == ["layers.0", "layers.1"]
    model.embed.weight = model.layers[1].weight
    assert quantizable(model) == ["layers.0"]


@pytest.mark.parametrize("plan", ["qlora,bf16", "qlora,lora", "qlora,int8", "int8,lora,bf16"])
def test_what_changes_the_same_weights_cannot_be_combined(plan: str) -> None:
    with pytest.raises(UsageError, match="cannot be combined"):
        Plan.parse(plan)


def test_int8_has_no_run_alone() -> None:
    assert labels_of([Plan.parse("int8,lora")]) == ["baseline", "lora", "int8,lora"]


def test_int8_needs_something_to_train() -> None:
    with pytest.raises(UsageError, match='"int8" requires "adapters"'):
        Plan.parse("int8")


@pytest.mark.parametrize("again", ["qlora", "int8,lora"])
def test_a_model_that_is_quantized_already_is_refused(again: str) -> None:
    workload = toy_workload()
    Plan.parse("qlora").apply(workload)
    with pytest.raises(UsageError, match=r'"blocks.0.wq" of "toy" has a quantized weight already'):
        Plan.parse(again).check(workload)


def test_updates_are_not_merged_into_quantized_weights() -> None:
    workload = toy_workload()
    Plan.parse("qlora").apply(workload)
    with pytest.raises(UsageError, match=r"blocks.0.wq is quantized"):
        merge(workload.model)


def test_code_books_of_a_simulation_do_not_reach_real_runs() -> None:
    simulate(toy_workload, device="cpu", strategies="qlora", steps=1)
    assert all(type(code) is Tensor for code in bitsandbytes.functional.name2qmap.values())


def test_the_settings_that_qlora_has_from_lora_are_described_as_there() -> None:
    described = help_of(QLoRA.Config)
    assert {name: described[name] for name in help_of(LoRA.Config)} == help_of(LoRA.Config)
    assert all(described.values())
