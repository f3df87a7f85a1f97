"""Training steps of `hf:WHAT`: each kind of model trains, settings do what they say, and the command line runs them."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
if find_spec("peft") is None:  # its import takes seconds, of each process that collects the tests
    pytest.skip("PEFT is not installed", allow_module_level=True)

import torch

import memscope
from memscope.errors import MemscopeError
from memscope.runs.checks import check_plans
from memscope.strategies import Plan
from memscope.trace import CATEGORIES, PHASES
from memscope.workload.building import build_workload
from memscope.workload.description import Workload

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, **LAYERS}
VISION = {"image_size": 16, "patch_size": 8, **LAYERS}
WHISPER = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {"vocab_size": 64, "max_position_embeddings": 32, **LAYERS}
MODELS = {
    "classes of text": {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **BERT},
    "speech": {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], **WHISPER},
}
"""Kinds of inputs that tests/integration/test_models.py has no model for."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return written(tmp_path / "tiny", LLAMA)


def written(folder: Path, config: dict[str, object]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def built(what: str, **settings: object) -> Workload:
    """The workload as on the host, without memory for the weights."""
    with torch.device("meta"):
        return build_workload(memscope.hf(what, **settings))


@pytest.mark.parametrize("kind", MODELS)
def test_a_simulated_step_equals_the_recorded_one(kind: str, tmp_path: Path) -> None:
    what = memscope.hf(written(tmp_path / "tiny", MODELS[kind]), micro_batch=2, seq_len=8, target_len=4)
    simulated, real = memscope.simulate(what, device="cpu"), memscope.record(what)
    assert simulated.requested.tolist() == real.requested.tolist()


GPT_NEO = {
    "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "vocab_size": 64, "max_position_embeddings": 32,
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "window_size": 8,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
FLASH = {"seq_len": 8, "dtype": "bf16", "attention": "flash_attention_2"}


@pytest.mark.parametrize("config", [LLAMA, GPT_NEO], ids=["asks when it runs", "asks when it is imported"])
def test_flash_attention_2_works_without_the_package_and_leaves_transformers_as_it_was(
    config: dict[str, object], tmp_path: Path
) -> None:
    from transformers import modeling_flash_attention_utils as functions
    from transformers.utils import is_flash_attn_2_available, is_torch_cuda_available

    before = dict(vars(functions))
    trace = memscope.simulate(memscope.hf(written(tmp_path / "tiny", config), **FLASH), device="a100-40gb", steps=1)
    assert {"memscope.flash_attn_2_forward.default", "memscope.flash_attn_2_backward.default"} <= set(trace.ops)
    assert trace.meta["assumptions"] == []
    assert vars(functions) == before
    assert not is_flash_attn_2_available()
    assert not is_torch_cuda_available()
    assert not hasattr(sys.modules.get("transformers.models.gpt_neo.modeling_gpt_neo"), "_flash_attention_forward")


def test_plans_for_a_model_with_flash_attention_can_be_checked(folder: str) -> None:
    settings = {"seq_len": "8", "dtype": "bf16", "attention": "flash_attention_2"}
    assert check_plans(f"hf:{folder}", None, settings, [Plan.parse("ckpt")], offered=["lora"]) == ["lora"]


def test_samples_joined_to_one_row_take_the_kernel_for_packed_samples(folder: str) -> None:
    what = memscope.hf(folder, **FLASH, micro_batch=3, packing=True)
    trace = memscope.simulate(what, device="a100-40gb", steps=1)
    (forward,) = (i for i, op in enumerate(trace.ops) if op == "memscope.flash_attn_2_forward.default")
    backward = trace.ops.index("memscope.flash_attn_2_backward.default")
    assert trace.requested[trace.op == forward].tolist() == 2 * [24 * 32 * 2, 4 * 24 * 4, 16]
    rows = 4 * (24 + 3 * 128)  # of 4 heads; head size 8 is rounded up to 32
    assert trace.requested[trace.op == backward].tolist() == 2 * [rows * 4, rows * 32 * 4]


def test_flash_attention_3_runs_on_a_hopper_gpu(folder: str) -> None:
    what = memscope.hf(folder, **{**FLASH, "attention": "flash_attention_3"})
    assert "memscope.flash_attn_3_backward.default" in memscope.simulate(what, device="h100-80gb", steps=1).ops
    with pytest.raises(MemscopeError, match=r"needs a Hopper GPU, compute capability 9\.0; a100-40gb has 8\.0"):
        memscope.simulate(what, device="a100-40gb", steps=1)


def test_flash_attention_of_float32_weights_is_refused(folder: str) -> None:
    with pytest.raises(
        MemscopeError, match=r"takes float16 or bfloat16, and got float32\..*dtype=bf16, or autocast=bf16"
    ):
        memscope.simulate(memscope.hf(folder, **{**FLASH, "dtype": "fp32"}), device="a100-40gb", steps=1)


def test_flash_attention_on_the_cpu_fails_as_without_memscope(folder: str) -> None:
    with pytest.raises(MemscopeError, match="the package for FlashAttention2 doesn't seem to be installed"):
        memscope.record(memscope.hf(folder, **FLASH), device="cpu")


def test_an_image_comes_before_its_text(tmp_path: Path) -> None:
    text = {key: value for key, value in LLAMA.items() if key != "architectures"}
    vision = {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}
    config = {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text,
        "vision_config": vision, "image_token_index": 63, "image_seq_length": 4,
    }  # fmt: skip
    workload = built(written(tmp_path / "tiny", config), seq_len=8, micro_batch=2)
    (batch,) = workload.split(workload.batches[0], 1)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert (batch["input_ids"] == 63).sum(1).tolist() == [4, 4]  # (16 / 8)² patches
    with pytest.raises(MemscopeError, match="an image alone takes 4 tokens: choose at least 6"):
        built(str(tmp_path / "tiny"), seq_len=5)


def test_qwen_is_told_which_tokens_are_an_image(tmp_path: Path) -> None:
    text = {"vocab_size": 64, "num_key_value_heads": 2, **LAYERS}
    rotary = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = {
        "model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text", **text, **rotary},
        "vision_config": vision, "image_token_id": 60, "video_token_id": 61,
    }  # fmt: skip
    what = memscope.hf(written(tmp_path / "tiny", config), task="image-text", seq_len=8, image_size=16, dtype="bf16")
    workload = what()
    (batch,) = workload.split(workload.batches[0], 1)
    assert (batch["mm_token_type_ids"] != 0).equal(batch["input_ids"] == 60)
    assert memscope.simulate(what, device="cpu").events  # transformers refuses images without these types


def test_pixels_have_the_dtype_of_the_weights(tmp_path: Path) -> None:
    # A convolution takes no float32 pixels with bfloat16 weights.
    config = {"model_type": "convnext", "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32}
    what = memscope.hf(written(tmp_path / "tiny", config), task="image-classification", dtype="bf16")
    workload = what()
    (batch,) = workload.split(workload.batches[0], 1)
    assert batch["pixel_values"].dtype is torch.bfloat16
    assert memscope.simulate(what, device="cpu").events


def test_packed_samples_are_one_row_whose_positions_restart(folder: str) -> None:
    workload = built(folder, micro_batch=2, accumulation=2, seq_len=3, packing=True)
    first, second = workload.split(workload.batches[0], 2)
    assert first["input_ids"].shape == second["labels"].shape == (1, 6)
    assert first["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert "attention_mask" not in first


def test_settings_reach_the_model_and_the_plan(folder: str) -> None:
    workload = built(
        folder, dtype="bf16", fp32_modules=("norm",), vocab_size=80, overrides="num_hidden_layers=1", autocast="bf16",
        accumulation=2, clip_grad_norm=1.0, trained="lm_head", attention="eager", use_cache=True,
    )  # fmt: skip
    parameters = dict(workload.model.named_parameters())
    assert parameters["lm_head.weight"].shape == (80, 32)
    assert {name for name, one in parameters.items() if one.dtype is torch.float32} == {
        "model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip
    assert {name for name, one in parameters.items() if one.requires_grad} == {"lm_head.weight"}
    config = workload.model.config
    assert (config.num_hidden_layers, config._attn_implementation, config.use_cache) == (1, "eager", True)
    plan = workload.plan
    assert (plan.micro_batches, plan.autocast, plan.clip_grad_norm) == (2, torch.bfloat16, 1.0)


def test_the_dtype_is_that_of_the_configuration(tmp_path: Path) -> None:
    low = built(written(tmp_path / "low", {**LLAMA, "torch_dtype": "bfloat16"}))
    plain = built(written(tmp_path / "plain", LLAMA))
    assert (low.model.dtype, plain.model.dtype) == (torch.bfloat16, torch.float32)


def test_the_adapter_is_pefts_and_its_weights_are_float32_unless_told_otherwise(folder: str) -> None:
    adapter = "lora:r=4,target_modules=q_proj+v_proj"
    for dtype, expected in ((None, torch.float32), ("bf16", torch.bfloat16)):
        workload = built(folder, dtype="bf16", adapter=adapter, adapter_dtype=dtype)
        trained = [one for one in workload.model.parameters() if one.requires_grad]
        assert sum(one.numel() for one in trained) == 2 * 2 * 4 * (32 + 32)  # layers, matrices, r, in + out
        assert {one.dtype for one in trained} == {expected}


def test_an_adapter_that_peft_does_not_know_is_refused(folder: str) -> None:
    with pytest.raises(MemscopeError, match=r'has no method "LORAA": did you mean "lora"'):
        built(folder, adapter="loraa:r=4")
    with pytest.raises(MemscopeError, match=r'LoraConfig of the installed PEFT has no "rang"'):
        built(folder, adapter="lora:rang=4,target_modules=q_proj")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_an_adapter_trains(folder: str, reentrant: bool) -> None:
    settings = {"adapter": "lora:r=4,target_modules=q_proj", "micro_batch": 4, "seq_len": 32}
    plain = memscope.simulate(memscope.hf(folder, **settings), device="cpu")
    what = memscope.hf(folder, **settings, gradient_checkpointing=True, reentrant=reentrant)
    checkpointed = memscope.simulate(what, device="cpu")
    assert checkpointed.by("category", at="peak")["activation"] < plain.by("category", at="peak")["activation"]


def test_padding_is_on_the_right_of_all_samples_but_the_first_and_needs_a_mask(folder: str) -> None:
    workload = built(folder, micro_batch=3, seq_len=4, padding=2)
    (batch,) = workload.split(workload.batches[0], 1)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    longest = {"seq_len": 8, "micro_batch": 2, "dtype": "bf16"}
    equal, padded = (
        memscope.simulate(memscope.hf(folder, **longest, padding=padding), steps=1).ops for padding in (None, 1)
    )
    assert "aten._scaled_dot_product_flash_attention.default" in equal
    assert "aten._scaled_dot_product_efficient_attention.default" in padded


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"padding": 4}, "a sample has 4 tokens: choose fewer"),
        ({"padding": 1, "packing": True}, "packed samples have no padding"),
    ],
)
def test_padding_that_cannot_be_is_refused(folder: str, settings: dict[str, object], told: str) -> None:
    with pytest.raises(MemscopeError, match=told):
        built(folder, seq_len=4, **settings)


def test_kept_outputs_hold_the_logits_through_the_update(folder: str) -> None:
    def in_update(keep: bool) -> int:
        trace = memscope.simulate(memscope.hf(folder, seq_len=32, dtype="bf16", keep_outputs=keep), device="cpu")
        update = trace.mark_event[trace.mark_phase == PHASES.index("optimizer")][0]
        return int(trace.allocated[update])

    assert in_update(keep=True) - in_update(keep=False) == 32 * 64 * 2  # tokens, vocabulary, bytes of bf16


def test_a_kept_batch_is_there_during_the_update(folder: str) -> None:
    def in_update(keep: bool) -> int:
        trace = memscope.simulate(memscope.hf(folder, micro_batch=4, seq_len=32, keep_batch=keep), device="cpu")
        update = trace.mark_event[trace.mark_phase == PHASES.index("optimizer")][0]
        return int(trace.timeline("input")[update])

    assert in_update(keep=True) - in_update(keep=False) == 3 * 4 * 32 * 8  # ids, mask and labels of 8 bytes


@pytest.mark.parametrize(("after", "times"), [("loss", 2 * 2), ("step", 2)])  # a step has two micro-batches
def test_the_cache_is_emptied_in_every_step_of_the_number(
    folder: str, monkeypatch: pytest.MonkeyPatch, after: str, times: int
) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    settings = {"seq_len": 4, "accumulation": 2, "empty_cache_every": 2, "empty_cache_after": after}
    memscope.record(memscope.hf(folder, **settings), steps=3)
    assert len(emptied) == times  # in steps 0 and 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adafactor", "Adafactor"),
        ("adamw_torch_fused", "AdamW"),
        ("sgd", "SGD"),
        ("paged_adamw_8bit", "PagedAdamW8bit"),
    ],
)
def test_optimizers_have_their_names_of_the_trainer(folder: str, name: str, kind: str) -> None:
    workload = built(folder, optimizer=name)
    optimizer = workload.optimizer_factory(list(workload.model.parameters()), model=workload.model)
    assert type(optimizer).__name__ == kind
    matrices, vectors = optimizer.param_groups
    assert all(one.ndim == 2 for one in matrices["params"])
    assert all(one.ndim == 1 for one in vectors["params"])


def test_the_state_of_embeddings_has_32_bits_as_in_the_trainer(folder: str) -> None:
    trace = memscope.simulate(memscope.hf(folder, optimizer="adamw_8bit", seq_len=4), device="cpu")
    is_state = (trace.category == CATEGORIES.index("optimizer_state")) & (trace.born <= trace.peak.event)
    names = [trace.modules[module] for module in trace.module[is_state].tolist()]
    sizes = dict(zip(names, trace.requested[is_state].tolist(), strict=True))
    assert sizes["model.embed_tokens"] == 4 * 64 * 32


def test_optimizers_that_are_not_simulated_are_refused(folder: str) -> None:
    with pytest.raises(MemscopeError, match=r'optimizer="galore_adamw" is not supported. Choose another'):
        built(folder, optimizer="galore_adamw")
    with pytest.raises(MemscopeError, match=r'optimizer="adamv_torch": did you mean "adamw_torch"'):
        built(folder, optimizer="adamv_torch")


def test_the_command_line_profiles_a_folder(run, folder: str) -> None:
    words = ["hf:" + folder, "--device", "t4", "--set", "seq_len=8", "micro_batch=2", "dtype=fp32"]
    code, out, err = run("profile", *words, "-s", "lora", "--json")
    assert code == 0, err
    document = json.loads(out)
    base, lora = document["runs"]
    assert (
        base["parameters"]["total"]
        == base["parameters"]["trainable"]
        == 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    )
    assert lora["parameters"]["trainable"] == 2 * 2 * 16 * (32 + 32)
    assert Path(base["trace"]).parent.name.startswith("tiny-")


def test_the_command_line_tells_a_name_that_is_nearly_right(run) -> None:
    code, _, err = run("profile", "hf:lama-2-7b")
    assert code == 2
    assert 'did you mean "llama-2-7b"?' in err


NF4 = "load_in_4bit,bnb_4bit_quant_type=nf4,bnb_4bit_use_double_quant=true,bnb_4bit_compute_dtype=bfloat16"


@pytest.mark.parametrize("quantization", [NF4, "load_in_8bit"])
def test_quantized_weights_with_an_adapter_of_peft_are_simulated_as_they_run(folder: str, quantization: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    settings = {"seq_len": 8, "adapter": "lora:r=2,target_modules=q_proj", "dtype": "bf16", "autocast": "bf16"}
    what = memscope.hf(folder, quantization=quantization, **settings)
    simulated, real = memscope.simulate(what, device="cpu"), memscope.record(what)
    assert simulated.requested.tolist() == real.requested.tolist()
    assert real.meta["parameters"]["trainable"] == 2 * 2 * 2 * 32  # in two layers, two matrices of rank 2


@pytest.mark.parametrize(("kbit_training", "size"), [(None, 4), ("false", 2)])
def test_what_is_not_quantized_is_float32_as_peft_prepares_it(folder: str, kbit_training: str, size: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    given = {} if kbit_training is None else {"kbit_training": False}
    trace = memscope.simulate(
        memscope.hf(folder, quantization=NF4, seq_len=8, adapter="lora:r=2", dtype="bf16", **given), device="a100-80gb"
    )
    assert trace.requested[trace.module == trace.modules.index("lm_head")][0] == size * 64 * 32


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("load_in_4bits", '"load_in_4bits": did you mean "load_in_4bit"'),
        ("load_in_4bit,load_in_8bit", "load_in_4bit and load_in_8bit are both True: choose one"),
        ("load_in_4bit,bnb_4bit_quant_type=nf5", "bnb_4bit_quant_type: nf5: did you mean"),
        ("load_in_4bit,bnb_4bit_compute_dtype=int8", "bnb_4bit_compute_dtype: int8"),
    ],
)
def test_a_quantization_that_cannot_be_used_is_refused(folder: str, quantization: str, message: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(MemscopeError, match=message):
        built(folder, quantization=quantization)


def test_a_model_that_is_stored_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    stored = {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    folder = written(tmp_path / "stored", {**LLAMA, "quantization_config": stored})
    with torch.device("cpu"):
        model = build_workload(memscope.hf(folder)).model
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with pytest.raises(MemscopeError, match="the weights are quantized already"):
        built(folder, quantization="load_in_8bit")
