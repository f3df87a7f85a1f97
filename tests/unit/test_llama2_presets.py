"""Shapes of the LLaMA2 target's models: presets compared with published files, and configurations read from files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import FORMATS, SMALL, Format, saved

from memscope.errors import UsageError
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import PRESETS, Config, read_preset
from memscope.targets.llama2.weights import read_shape, save_weights
from memscope.workload.target import find_target

HF_CONFIGS = {
    # config.json of mistralai/Mistral-7B-v0.1, meta-llama/Meta-Llama-3-8B, Llama-3.1-8B, Llama-3.2-1B and -3B, and
    # Llama-2-7b-hf: the keys that define the shape.
    "7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "llama3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "llama3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "llama3.2-1b": {
        "model_type": "llama", "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "llama3.2-3b": {
        "model_type": "llama", "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "num_attention_heads": 24, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    },
}  # fmt: skip

META_PARAMS = {
    # params.json of Llama-2-7b and -70b and of Meta-Llama-3-8B.
    "7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1},
    "70b": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
        "norm_eps": 1e-05, "vocab_size": -1,
    },
    "llama3-8b": {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
    },
}  # fmt: skip


def shape_of(config: Config, *, context: bool = True) -> dict[str, Any]:
    names = ["dim", "n_layers", "n_heads", "kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps", "rope_theta"]
    names += ["rope_scaling", "sliding_window", "tied_head", *(["max_seq_len"] if context else [])]
    return {name: getattr(config.architecture, name) for name in names}


@pytest.mark.parametrize("preset", HF_CONFIGS)
def test_presets_have_the_shape_of_the_published_config_json(tmp_path: Path, preset: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS[preset]))
    assert shape_of(read_preset(tmp_path)) == shape_of(PRESETS[preset])


@pytest.mark.parametrize("preset", META_PARAMS)
def test_presets_have_the_shape_of_the_published_params_json(tmp_path: Path, preset: str) -> None:
    (tmp_path / "params.json").write_text(json.dumps(META_PARAMS[preset]))
    # It does not hold the context.
    assert shape_of(read_preset(tmp_path), context=False) == shape_of(PRESETS[preset], context=False)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_preset_can_be_written_in_both_formats(tmp_path: Path, preset: str, format: Format) -> None:
    config = dataclasses.replace(PRESETS[preset], dim=256, n_heads=8, n_kv_heads=4, n_layers=1)
    with torch.device("meta"):
        model = Llama(dataclasses.replace(config.architecture, vocab_size=128))
    model = model.to_empty(device="cpu")
    save_weights(model, tmp_path / "w", format)
    there = dataclasses.replace(model.arch, **read_shape(tmp_path / "w"))
    for name in ("dim", "n_layers", "kv_heads", "hidden_dim", "rope_theta", "rope_scaling", "sliding_window"):
        assert getattr(there, name) == getattr(model.arch, name), name


def test_use_scaled_rope_means_metas_constants(tmp_path: Path) -> None:
    # apply_scaling in meta-llama/llama-models, models/llama3/model.py: 8, 1, 4, 8192.
    file = tmp_path / "params.json"
    file.write_text(json.dumps(META_PARAMS["llama3-8b"] | {"use_scaled_rope": True}))
    assert read_shape(file)["rope_scaling"] == (8.0, 1.0, 4.0, 8192)


def test_rope_scaling_that_params_json_cannot_express_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, rope_scaling=(8.0, 1.0, 2.0, 8192))
    with pytest.raises(UsageError, match=r"cannot be saved in Meta's format"):
        saved(tmp_path / "w", "meta", config)
    assert not list(tmp_path.iterdir())


def test_a_preset_may_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS["llama3.2-1b"]))
    target = find_target("llama2")
    for path in (tmp_path, tmp_path / "config.json"):
        config = target.configure(str(path), {"n_layers": "2"})
        assert (config.dim, config.n_layers, config.tied_head) == (2048, 2, True)
    with pytest.raises(UsageError, match=r'no preset "llama3.2-2b": did you mean "llama3.2-[13]b"\?.*or a path'):
        target.configure("llama3.2-2b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen2"}, '"model_type" is "qwen2", expected "llama" or "mistral"'),
        ({"attention_bias": True}, '"attention_bias" is true, but this target supports only false'),
        ({"hidden_act": "gelu"}, '"hidden_act" is "gelu", but this target supports only "silu"'),
        ({"quantization_config": {"bits": 4}}, '"quantization_config" is {"bits": 4}'),
        ({"head_dim": 96}, '"head_dim" is 96'),
        ({"num_attention_heads": 33}, '"num_attention_heads" is 33, which does not divide "hidden_size" 4096'),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            '"rope_type" is "linear", expected "llama3" or "default"',
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 'missing "low_freq_factor"'),
        ({"hidden_size": "4096"}, '"hidden_size" is "4096", expected a whole number from 1'),
        ({"num_hidden_layers": None}, 'missing "num_hidden_layers"'),
        ({"rms_norm_eps": 0}, '"rms_norm_eps" is 0, expected a number above 0'),
    ],
)
def test_a_config_json_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HF_CONFIGS["7b"] | changes))
    with pytest.raises(UsageError) as caught:
        read_preset(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
