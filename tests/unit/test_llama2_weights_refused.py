"""Weights that are refused: the message for each; nothing in them is ever run."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import FORMATS, SMALL, TIED, Format, model_of, same, saved, split_by_rank
from safetensors.torch import load_file, save_file
from torch import Tensor

from memscope.errors import UsageError
from memscope.targets.llama2.hf_format import write
from memscope.targets.llama2.target import Config
from memscope.targets.llama2.weights import load_weights


def refused(folder: Path, config: Config = SMALL) -> str:
    """The error message for a folder that cannot be loaded; the model is unchanged."""
    model = model_of(config, seed=1)
    with pytest.raises(UsageError) as caught:
        load_weights(model, folder)
    assert same(model, model_of(config, seed=1))
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the tensors of a folder of either format in place, without memscope's code."""
    file = next(path for path in folder.iterdir() if path.suffix in (".pth", ".safetensors"))
    tensors = torch.load(file, weights_only=True) if file.suffix == ".pth" else load_file(file)
    change(tensors)
    torch.save(tensors, file) if file.suffix == ".pth" else save_file(tensors, file)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "absent")
    assert "neither config.json nor params.json" in refused(tmp_path)
    (tmp_path / "params.json").write_text((saved(tmp_path / "w", "meta") / "params.json").read_text())
    assert "no consolidated.00.pth next to params.json" in refused(tmp_path)


def test_hugging_faces_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "w", "huggingface")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is not supported: convert it" in refused(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\xff\xfe"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_configuration_is_refused(tmp_path: Path, format: Format, content: str) -> None:
    folder = saved(tmp_path / "w", format)
    file = folder / ("config.json" if format == "huggingface" else "params.json")
    file.write_bytes(content.encode("latin-1"))
    assert str(file) in refused(folder)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.9])
def test_truncated_weights_are_refused(tmp_path: Path, format: Format, kept: float) -> None:
    folder = saved(tmp_path / "w", format)
    file = next(path for path in folder.iterdir() if path.suffix in (".pth", ".safetensors"))
    os.truncate(file, int(file.stat().st_size * kept))
    assert f"{file}: truncated" in refused(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_of_another_model_are_refused_with_the_differences(tmp_path: Path, format: Format) -> None:
    said = refused(saved(tmp_path / "w", format), dataclasses.replace(SMALL, n_layers=3, rope_theta=500.0))
    assert "n_layers is 2 in the files, 3 in the model; rope_theta is 10000.0 in the files, 500.0 in the model" in said
    assert f"--preset {tmp_path / 'w'}" in said


NAMES: dict[Format, str] = {
    "meta": "layers.1.attention.wo.weight",
    "huggingface": "model.layers.1.self_attn.o_proj.weight",
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, format: Format) -> None:
    folder = saved(tmp_path / "w", format)
    rewrite(folder, lambda tensors: tensors.update({NAMES[format]: torch.zeros(32, 31)}))
    assert f"{NAMES[format]} in " in (said := refused(folder))
    assert "has shape [32, 31], expected [32, 32]" in said


def test_half_a_tensor_is_a_shard_in_metas_format_only(tmp_path: Path) -> None:
    said = []
    for format in FORMATS:
        folder = saved(tmp_path / format, format)
        rewrite(folder, lambda tensors, name=NAMES[format]: tensors.update({name: torch.zeros(32, 16)}))
        said.append(refused(folder))
    assert "has shape [32, 16], expected [32, 32]" in said[0]
    assert "is one of 2 shards, but only 1 are there: consolidated.01.pth is missing" in said[1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "named"), [(torch.int8, "int8|I8"), (torch.float8_e4m3fn, "float8_e4m3fn|F8_E4M3")])
def test_quantized_weights_are_refused(tmp_path: Path, format: Format, dtype: torch.dtype, named: str) -> None:
    folder = saved(tmp_path / "w", format)
    rewrite(folder, lambda tensors: tensors.update({NAMES[format]: torch.zeros(32, 32).to(dtype)}))
    said = refused(folder)
    assert any(f"has dtype {name}; expected float32" in said for name in named.split("|"))


@pytest.mark.parametrize("format", FORMATS)
def test_missing_and_surplus_tensors_are_named(tmp_path: Path, format: Format) -> None:
    folder = saved(tmp_path / "w", format)
    rewrite(folder, lambda tensors: tensors.pop(NAMES[format]))
    assert "1 of 21 tensors are missing: layers.1.attention.wo.weight" in refused(folder)
    rewrite(folder, lambda tensors: tensors.update({NAMES[format]: torch.zeros(32, 32), "value_head": torch.ones(1)}))
    assert "the model has no parameter for value_head" in refused(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_tables_stored_by_older_programs_are_accepted(tmp_path: Path, format: Format) -> None:
    folder, loaded = saved(tmp_path / "w", format), model_of(seed=1)
    table = "rope.freqs" if format == "meta" else "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_weights(loaded, rewrite(folder, lambda tensors: tensors.update({table: torch.ones(4)})))
    assert same(loaded, model_of())


def test_a_missing_or_untied_head_is_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    tied = saved(tmp_path / "tied", "meta", TIED)
    with pytest.raises(UsageError, match=r"output.weight differs from tok_embeddings.weight.*set tied_head=false"):
        load_weights(model_of(TIED), saved(tmp_path / "untied", "meta"))
    rewrite(tied, lambda tensors: tensors.pop("output.weight"))
    assert "if the head is the embedding, set tied_head=true" in refused(tied)
    loaded = model_of(TIED, seed=1)
    load_weights(loaded, tied)
    assert same(loaded, model_of(TIED))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for absent in (1, 3):
        folder = split_by_rank(saved(tmp_path / f"without {absent}", "meta"), 4)
        (folder / f"consolidated.{absent:02}.pth").unlink()
        assert f"consolidated.{absent:02}.pth is missing" in refused(folder)


def test_shards_of_two_models_are_refused(tmp_path: Path) -> None:
    folder = split_by_rank(saved(tmp_path / "w", "meta"), 2)
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True)
    del shard["norm.weight"]
    torch.save(shard, folder / "consolidated.01.pth")
    assert "consolidated.01.pth: not of the same model as the first shard: only one of them has norm.weight" in refused(
        folder
    )


def test_an_index_is_checked_against_its_files(tmp_path: Path) -> None:
    model = model_of()
    write(model.state_dict(), model.arch, tmp_path, shard_bytes=50_000)
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    first, second = names["model.embed_tokens.weight"], names["model.norm.weight"]

    edit(index, weight_map=names | {"lm_head.weight": first})
    assert "names tensors that their files lack: lm_head.weight" in refused(tmp_path)
    edit(index, weight_map=names | {"lm_head.weight": "../elsewhere.safetensors"})
    assert "names files outside its folder: ../elsewhere.safetensors" in refused(tmp_path)
    edit(index, weight_map=["model.norm.weight"])
    assert 'expected "weight_map", an object' in refused(tmp_path)
    edit(index, weight_map=names)
    (tmp_path / second).unlink()
    assert f"shard {second} is missing" in refused(tmp_path)


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    folder, ran = saved(tmp_path / "w", "meta"), tmp_path / "ran"
    torch.save(
        {"norm.weight": torch.ones(32), "x": _Payload(ran)},
        folder / "consolidated.00.pth",
        _use_new_zipfile_serialization=zipped,
    )
    said = refused(folder)
    assert str(folder / "consolidated.00.pth") in said
    assert not ran.exists()
    if zipped:
        assert f"names {os.mkdir.__module__}.mkdir, which may be code: refused, and nothing in it was run" in said
        torch.load(folder / "consolidated.00.pth", weights_only=False)  # the payload works when it is unpickled
        assert ran.is_dir()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"model": {"norm.weight": torch.ones(32)}}, torch.ones(2)])
def test_a_file_with_anything_but_tensors_by_name_is_refused(tmp_path: Path, content: Any) -> None:
    folder = saved(tmp_path / "w", "meta")
    torch.save(content, folder / "consolidated.00.pth")
    assert "expected tensors by name and nothing else" in refused(folder)


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "w", "meta")
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    assert "not weights written by torch.save" in refused(folder)
    assert not (tmp_path / "ran").exists()
