"""Files of LoRA adapters of the LLaMA2 target: round trips, and files that are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import SMALL, files_no_larger_than, model_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from memscope.errors import MemscopeError, UsageError
from memscope.strategies import Plan
from memscope.strategies.lora import LoRALinear, merge
from memscope.targets.llama2.adapters import load_adapter, save_adapter
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import build

PLAN = "lora:r=2,alpha=6,dropout=0.25"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def adapted(plan: str = PLAN, seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    workload = build(SMALL)
    Plan.parse(plan).apply(workload)
    assert isinstance(workload.model, Llama)
    for layer in updates(workload.model).values():
        torch.nn.init.normal_(layer.lora_b)
    return workload.model


def updates(model: Llama) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def tensors_of(model: Llama) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(folder: Path, model: Llama | None = None) -> str:
    """The error message for a folder that cannot be loaded; the model is unchanged."""
    model = model or model_of()
    before = tensors_of(model)
    with pytest.raises(UsageError) as caught:
        load_adapter(model, folder)
    after = tensors_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("plan", ["", PLAN])
def test_a_saved_adapter_is_loaded_on_a_model_with_or_without_updates(folder: Path, plan: str) -> None:
    model = adapted(plan, seed=1)
    load_adapter(model, folder)
    expected = updates(adapted())
    assert updates(model).keys() == expected.keys()
    for name, layer in updates(model).items():
        assert torch.equal(layer.lora_a, expected[name].lora_a)
        assert torch.equal(layer.lora_b, expected[name].lora_b)
        assert (layer.scaling, layer.dropout.p) == (6 / 2, 0.25)


def test_a_model_that_loads_an_adapter_trains_nothing_else(folder: Path) -> None:
    model = model_of()
    load_adapter(model, folder)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in updates(model) for part in ("lora_a", "lora_b")}


def test_an_adapter_of_other_layers_or_another_scale_is_refused(folder: Path) -> None:
    said = refused(folder, adapted("lora:r=2,alpha=6,targets=wq"))
    assert "adapted only in the model or only in the file: layers.0.attention.wv, layers.1.attention.wv" in said
    assert "r=2, alpha=6.0 in the file, r=2, alpha=4.0 in the model" in refused(folder, adapted("lora:r=2,alpha=4"))
    assert "r=2, alpha=6.0 in the file, r=3, alpha=6.0 in the model" in refused(folder, adapted("lora:r=3,alpha=6"))


def test_merged_updates_are_not_replaced(folder: Path) -> None:
    model = adapted()
    merge(model)
    assert "layers.0.attention.wq is merged into the weight: unmerge it first" in refused(folder, model)


def test_alpha_survives_its_division_by_the_rank(tmp_path: Path) -> None:
    save_adapter(adapted("lora:r=49,alpha=1"), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 1


def test_missing_files_are_named(folder: Path) -> None:
    assert "no such folder" in refused(folder / "absent")
    (folder / "adapter_model.safetensors").unlink()
    assert f"{folder / 'adapter_model.safetensors'}: no such file" in refused(folder)
    (folder / "adapter_config.json").unlink()
    assert f"{folder / 'adapter_config.json'}: no such file" in refused(folder)


def test_truncated_tensors_are_refused(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 1000)
    assert "truncated, or not a safetensors file" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, '"peft_type" is "IA3", expected "LORA"'),
        ({"r": 0}, '"r" is 0, expected a whole number from 1'),
        ({"r": 4}, "lora_A.weight in adapter_model.safetensors has shape [2, 32], expected [4, 32]"),
        ({"lora_alpha": "6"}, '"lora_alpha" is "6", expected a number above 0'),
        ({"lora_dropout": 1.0}, '"lora_dropout" is 1.0, expected a number from 0 and below 1'),
        ({"use_dora": True}, '"use_dora" is true, expected false: only plain LoRA can be loaded'),
        (
            {"alpha_pattern": {"v_proj": 1}},
            '"alpha_pattern" is {"v_proj": 1}, expected {}: only plain LoRA can be loaded',
        ),
    ],
)
def test_invalid_settings_are_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refused(edit(folder, **changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{Q}.lora_B.weight": torch.ones(31, 2)}, "q_proj.lora_B.weight in adapter_model.safetensors has shape [31"),
        ({f"{Q}.lora_B.weight": torch.ones(32, 2).to(torch.int8)}, "has dtype I8, expected floating point"),
        ({"base_model.model.lm_head.weight": torch.ones(1)}, "no module for base_model.model.lm_head.weight"),
        ({Q.replace("0", "7") + ".lora_A.weight": torch.ones(2, 32)}, "no module for base_model.model.model.layers.7"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: dict[str, Tensor], said: str) -> None:
    assert said in refused(rewrite(folder, lambda tensors: tensors.update(change)))


def test_an_adapter_without_tensors_is_refused(folder: Path) -> None:
    assert "the file holds no tensors" in refused(rewrite(folder, lambda tensors: tensors.clear()))


def test_a_model_without_updates_has_no_adapter_to_save(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no LoRA updates to save"):
        save_adapter(model_of(), tmp_path / "adapter")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with files_no_larger_than(1000), pytest.raises(MemscopeError, match="nothing was saved"):
        save_adapter(adapted(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_exists_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(UsageError, match="already exists"):
        save_adapter(adapted(), folder)
