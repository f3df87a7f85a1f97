"""Files of the LLaMA2 target's weights: round trips, reading tensor by tensor, saving completely or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import FORMATS, SMALL, TIED, Format, files_no_larger_than, model_of, same, saved, split_by_rank
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memscope import simulate
from memscope.errors import MemscopeError, UsageError
from memscope.strategies import Plan
from memscope.strategies.lora import LoRALinear, merge
from memscope.targets.llama2 import weights
from memscope.targets.llama2.hf_format import rotary_order, write
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import Config, build
from memscope.targets.llama2.weights import load_weights, save_weights, without_initialization


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("config", [SMALL, TIED, dataclasses.replace(SMALL, dtype="bf16")])
def test_every_weight_is_the_same_after_saving_and_loading(tmp_path: Path, format: Format, config: Config) -> None:
    loaded = model_of(config, seed=1)
    load_weights(loaded, saved(tmp_path / "w", format, config))
    assert same(loaded, model_of(config))


def test_both_formats_hold_the_same_model(tmp_path: Path) -> None:
    over_meta, back = model_of(seed=1), model_of(seed=2)
    load_weights(over_meta, saved(tmp_path / "meta", "meta"))
    save_weights(over_meta, tmp_path / "hf")
    load_weights(back, tmp_path / "hf")
    assert same(back, model_of())


@pytest.mark.parametrize("embedding", [0, 1])
@pytest.mark.parametrize("shards", [2, 4])
def test_model_parallel_shards_are_merged(tmp_path: Path, shards: int, embedding: int) -> None:
    loaded = model_of(seed=1)
    load_weights(loaded, split_by_rank(saved(tmp_path / "w", "meta"), shards, embedding=embedding))
    assert same(loaded, model_of())


def test_large_models_are_saved_in_several_files_with_an_index(tmp_path: Path) -> None:
    model = model_of()
    write(model.state_dict(), model.arch, tmp_path, shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / file).values()) for file in index["weight_map"].values()}
    embedding = 1024 * 32 * 4  # larger than a shard may be, so alone in its file; the head too
    assert sorted(sizes.values())[-2:] == [embedding, embedding]
    assert all(size <= 50_000 for size in sorted(sizes.values())[:-2])
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters()) == sum(sizes.values())
    loaded = model_of(seed=1)
    load_weights(loaded, tmp_path)
    assert same(loaded, model)


def test_weights_are_converted_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    loaded = model_of(dataclasses.replace(SMALL, dtype="bf16"))
    load_weights(loaded, saved(tmp_path / "w", "huggingface"))
    assert loaded.norm.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.output.weight, model_of().output.weight.bfloat16())


def test_rotary_order_puts_pairs_half_a_head_apart_and_back() -> None:
    arch = SMALL.architecture  # 4 heads of 8 rows for queries, 2 for keys
    rows = torch.arange(32).view(32, 1)
    to_hf = rotary_order(rows, "layers.0.attention.wq", arch, to_hf=True)
    assert to_hf[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert to_hf[8:16, 0].tolist() == [8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(rotary_order(to_hf, "layers.0.attention.wq", arch, to_hf=False), rows)
    assert torch.equal(rotary_order(rows, "layers.0.attention.wv", arch, to_hf=True), rows)


def test_the_target_loads_weights_by_path(tmp_path: Path) -> None:
    folder = saved(tmp_path / "w", "meta")
    workload = build(dataclasses.replace(SMALL, weights=str(folder), seed=7))
    assert isinstance(workload.model, Llama)
    assert same(workload.model, model_of())


class _Allocations(TorchDispatchMode):
    """Peak bytes of operation results, without views of other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.empty):
            storage = result.untyped_storage()
            self.live[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, id(storage))
            self.most = max(self.most, sum(self.live.values()))
        return result


@pytest.mark.parametrize("format", FORMATS)
def test_loading_needs_no_more_than_one_tensor_beyond_the_model(tmp_path: Path, format: Format) -> None:
    folder, model = saved(tmp_path / "w", format), model_of(dataclasses.replace(SMALL, dtype="bf16"))
    with _Allocations() as allocations:
        load_weights(model, folder)
    rearranged = 32 * 32 * 4  # a query projection in float32, in Meta's order
    assert allocations.most == (rearranged if format == "huggingface" else 0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_simulation_reads_shapes_only(tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Tensor:
        raise AssertionError("data was read")

    checked = weights._pieces
    unreadable = lambda *args: [(p, dataclasses.replace(stored, read=never)) for p, stored in checked(*args)]  # noqa: E731
    monkeypatch.setattr(weights, "_pieces", unreadable)
    folder = saved(tmp_path / "w", format)
    config = dataclasses.replace(SMALL, weights=str(folder), accumulation=2)
    with pytest.raises(AssertionError, match="data was read"):
        build(config)
    loaded, random = (simulate(lambda c=c: build(c)) for c in (config, dataclasses.replace(config, weights=None)))
    assert loaded.peak.allocated_bytes == random.peak.allocated_bytes
    with pytest.raises(UsageError, match="n_layers is 2 in the files, 3 in the model"):
        simulate(lambda: build(dataclasses.replace(config, n_layers=3)))


def test_layers_made_without_initialization_take_no_random_number() -> None:
    state = torch.random.get_rng_state()
    with without_initialization():
        Llama(SMALL.architecture)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, format: Format) -> None:
    model = model_of()
    with files_no_larger_than(50_000), pytest.raises(MemscopeError, match="nothing was saved; is the disk full"):
        save_weights(model, tmp_path / "w", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path, format: Format) -> None:
    (tmp_path / "w").mkdir()
    with pytest.raises(UsageError, match="already exists and is not overwritten"):
        saved(tmp_path / "w", format)
    with pytest.raises(UsageError, match="there is no folder"):
        saved(tmp_path / "no" / "w", format)


def test_the_folder_gets_its_name_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memscope.targets.llama2.hf_format.save_file", killed)
    # Files that a killed process leaves behind do not have the name either.
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "w", "huggingface")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".w.")


@pytest.mark.parametrize("format", FORMATS)
def test_lora_updates_are_merged_before_weights_are_saved(tmp_path: Path, format: Format) -> None:
    workload = build(SMALL)
    Plan.parse("lora:r=2,targets=wq+wv").apply(workload)
    model = workload.model
    assert isinstance(model, Llama)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_b, std=0.1)
    with pytest.raises(UsageError, match="LoRA updates that are not merged"):
        save_weights(model, tmp_path / "w", format)
    merge(model)
    save_weights(model, tmp_path / "w", format)
    loaded = model_of()
    load_weights(loaded, tmp_path / "w")
    tokens = torch.arange(12).view(1, 12)
    model.eval()
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)


def test_a_bias_has_no_place_in_the_formats(tmp_path: Path) -> None:
    model = model_of()
    model.layers[0].attention.wq.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(UsageError, match=r"LLaMA's formats cannot hold layers.0.attention.wq.bias"):
        save_weights(model, tmp_path / "w")
