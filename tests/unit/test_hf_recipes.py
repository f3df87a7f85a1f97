"""Recipes of axolotl, transformers and PEFT: what they say about memory, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from memscope.errors import UsageError
from memscope.targets.hf import recipe_axolotl, recipe_peft, recipe_trainer
from memscope.targets.hf.axolotl_keys import HANDLED, NOTED, REFUSED, WITHOUT_EFFECT
from memscope.targets.hf.config import HfConfig
from memscope.targets.hf.target import resolve

AXOLOTL = {
    "base_model": "gpt2", "sequence_len": 256, "micro_batch_size": 2, "gradient_accumulation_steps": 4,
    "learning_rate": 2e-5, "optimizer": "adamw_torch", "datasets": [{"path": "x"}],
}  # fmt: skip
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_modules": ["c_attn"]}


def axolotl(**changes: Any) -> dict[str, Any]:
    return dict(recipe_axolotl.read({**AXOLOTL, **changes}, "train.yml").settings)


def refusal(**changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        recipe_axolotl.read({**AXOLOTL, **changes}, "train.yml")
    return str(caught.value)


def notes(**changes: Any) -> tuple[str, ...]:
    return recipe_axolotl.read({**AXOLOTL, **changes}, "train.yml").notes


def test_axolotl_sizes_of_a_step() -> None:
    settings = axolotl()
    assert [settings[key] for key in ("model", "seq_len", "micro_batch", "accumulation")] == ["gpt2", 256, 2, 4]
    assert settings["clip_grad_norm"] == 1.0  # the default of TrainingArguments
    assert settings["keep_batch"]


@pytest.mark.parametrize(
    ("keys", "dtype", "autocast"),
    [
        ({}, "bf16", "bf16"),  # bf16: auto
        ({"bf16": True}, "bf16", "bf16"),
        ({"bf16": False, "fp16": True}, "fp16", "fp16"),
        ({"fp16": True}, "fp16", "fp16"),
        ({"bf16": False, "bfloat16": True}, "bf16", "off"),
        ({"bf16": False}, "fp32", "off"),
    ],
)
def test_axolotl_dtypes(keys: dict[str, Any], dtype: str, autocast: str) -> None:
    settings = axolotl(**keys)
    assert (settings["dtype"], settings["autocast"]) == (dtype, autocast)


def test_axolotl_keeps_norms_and_embeddings_in_float32_where_attention_takes_it() -> None:
    assert axolotl(sdp_attention=True)["fp32_modules"] == ("norm", "embed_tokens", "lm_head")
    assert "fp32_modules" not in axolotl(flash_attention=True)
    assert "fp32_modules" not in axolotl(sdp_attention=True, **LORA)


def test_axolotl_checkpoints_reentrantly_unless_told_otherwise() -> None:
    assert axolotl(gradient_checkpointing=True)["reentrant"] is True
    assert axolotl(gradient_checkpointing=True, unfrozen_parameters=["lm_head"])["reentrant"] is False
    options = {"use_reentrant": False}
    assert axolotl(gradient_checkpointing=True, gradient_checkpointing_kwargs=options)["reentrant"] is False
    assert "reentrant" not in axolotl()


def test_axolotl_joins_packed_samples_only_for_flash_attention() -> None:
    assert axolotl(sample_packing=True, flash_attention=True)["packing"]
    assert not axolotl(sample_packing=True, sdp_attention=True)["packing"]
    assert any("without a block mask" in note for note in notes(sample_packing=True, sdp_attention=True))


def test_axolotl_qlora_is_nf4_with_double_quantization_and_no_float32_around_it() -> None:
    settings = axolotl(**{**LORA, "adapter": "qlora"}, load_in_4bit=True, bf16=True)
    assert settings["quantization"] == {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    assert (settings["kbit_training"], settings["adapter"]["r"]) == (False, 8)
    assert axolotl(**LORA, load_in_8bit=True)["quantization"] == {"load_in_8bit": True}


def test_axolotl_adapter_is_that_of_peft() -> None:
    adapter = axolotl(**LORA, lora_modules_to_save=["lm_head"], peft_use_dora=True)["adapter"]
    assert adapter == {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["c_attn"],
        "modules_to_save": ["lm_head"], "use_dora": True,
    }  # fmt: skip
    assert axolotl(**{**LORA, "lora_target_linear": True})["adapter"]["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both True: choose one"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both True: choose one"),
        ({"adapter": "qlora"}, "adapter: qlora needs load_in_4bit: true"),
        ({"load_in_4bit": True}, "load_in_4bit: true needs adapter: qlora"),
        ({**LORA, "adapter": "qlora", "load_in_8bit": True}, "adapter: qlora needs load_in_4bit: true"),
        ({"load_in_8bit": True}, "load_in_8bit: true needs adapter: lora"),
        ({"adapter": "lora"}, "adapter: lora needs lora_r, the rank"),
        ({"adapter": "lora", "lora_r": 8}, "needs lora_target_modules or lora_target_linear"),
        ({"deepspeed": "zero3.json"}, "deepspeed: zero3.json is not supported"),
        ({"rl": "dpo"}, "rl: dpo is not supported: its trainer runs several models"),
        ({"flash_attention": True, "sdp_attention": True}, "attention is given more than once"),
        ({"micro_batch_size": "two"}, "micro_batch_size: two: expected a whole number from 1"),
        ({"base_model": None}, 'which has a "base_model"'),
    ],
)
def test_axolotl_recipes_that_are_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)


def test_axolotl_keys_are_known_once_and_unknown_ones_are_named() -> None:
    groups = (HANDLED, NOTED.keys(), REFUSED.keys(), WITHOUT_EFFECT)
    assert sum(len(group) for group in groups) == len(set().union(*groups))
    (note,) = notes(micro_batch_sise=2, wandb_project="x")
    assert note == (
        "train.yml: not keys of axolotl 0.18.0, ignored: micro_batch_sise "
        '(micro_batch_sise: did you mean "micro_batch_size"?)'
    )
    assert "chunked_cross_entropy was ignored" in notes(chunked_cross_entropy=True)[0]


def test_an_axolotl_file_gives_the_model_and_settings_override_it(tmp_path: Path) -> None:
    file = tmp_path / "train.yml"
    file.write_text("base_model: gpt2\nsequence_len: 256\nmicro_batch_size: 2\noptimizer: adamw_bnb_8bit\n")
    program, source = resolve(HfConfig(model=str(file), micro_batch=3, optimizer="sgd"))
    assert (source.name, program.seq_len, program.micro_batch, program.optimizer) == ("gpt2", 256, 3, "sgd")


ARGUMENTS = {
    "output_dir": "x", "per_device_train_batch_size": 4, "max_grad_norm": 1.0, "bf16": True, "optim": "adafactor",
}  # fmt: skip


def test_training_arguments_are_what_the_trainer_does() -> None:
    values = {**ARGUMENTS, "gradient_accumulation_steps": 2, "torch_empty_cache_steps": 10, "max_length": 99}
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    settings = dict(recipe_trainer.read({**values, **checkpointing}, "args.json").settings)
    assert settings == {
        "micro_batch": 4, "accumulation": 2, "gradient_checkpointing": True, "reentrant": True, "autocast": "bf16",
        "clip_grad_norm": 1.0, "use_cache": False, "packing": False, "keep_batch": True, "seq_len": 99,
        "empty_cache_every": 10, "optimizer": "adafactor",
    }  # fmt: skip


def test_every_argument_of_the_installed_trainer_is_known() -> None:
    import dataclasses

    from transformers import TrainingArguments

    names = {field.name: 1 for field in dataclasses.fields(TrainingArguments) if not field.name.startswith("_")}
    refused = {"fsdp", "deepspeed", "use_liger_kernel", "label_smoothing_factor", "parallelism_config", "fp16"}
    given = {name: value for name, value in names.items() if name not in refused}
    assert not [note for note in recipe_trainer.read(given, "args.json").notes if "does not know" in note]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": True}, "bf16 and fp16 are both true: choose one"),
        ({"deepspeed": "ds.json"}, "deepspeed=ds.json is not supported"),
        ({"max_grad_norm": "x"}, "max_grad_norm=x: expected a number"),
    ],
)
def test_training_arguments_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_trainer.read({**ARGUMENTS, **changes}, "args.json")


def test_training_arguments_need_a_model(tmp_path: Path) -> None:
    file = tmp_path / "args.json"
    file.write_text(json.dumps(ARGUMENTS))
    with pytest.raises(UsageError, match=f"names no model: give the model, .*: hf:MODEL --set recipe={file}"):
        resolve(HfConfig(model=str(file)))
    program, source = resolve(HfConfig(model="gpt2", recipe=str(file)))
    assert (source.name, program.micro_batch, program.optimizer) == ("gpt2", 4, "adafactor")


def test_pickled_training_arguments_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"\x80")
    with pytest.raises(UsageError, match="a pickle, which memscope does not open"):
        resolve(HfConfig(model="gpt2", recipe=str(tmp_path / "training_args.bin")))


def test_an_adapter_folder_names_its_base_model(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "gpt2", "inference_mode": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    program, source = resolve(HfConfig(model=str(tmp_path)))
    assert source.name == "gpt2"
    assert program.adapter == {**adapter, "inference_mode": False}  # it is to be trained
    other, source = resolve(HfConfig(model="opt-125m", adapter=str(tmp_path)))
    assert (source.name, other.adapter) == ("opt-125m", program.adapter)


def test_an_adapter_may_be_written_on_the_command_line() -> None:
    assert recipe_peft.parse("lora:r=16,lora_dropout=0.1,target_modules=q_proj+v_proj") == {
        "peft_type": "LORA", "r": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    assert recipe_peft.parse("lora:target_modules=c_attn")["target_modules"] == ["c_attn"]
    assert recipe_peft.parse("lora:target_modules=all-linear")["target_modules"] == "all-linear"
    with pytest.raises(UsageError, match='"rank" is not KEY=VALUE'):
        recipe_peft.parse("lora:rank")
