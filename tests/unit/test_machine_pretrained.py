"""A simulated program loads pretrained models without their weights."""

import json
import struct

import pytest
from program_runs import run_source

pytest.importorskip("transformers", reason="transformers is not installed")

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
WEIGHTS = 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
"""Weights of this model: embedding and head, two layers, and the last norm."""


_IMPORTS = "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with `config.json` alone."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


def simulated(tmp_path, source, **options):
    return run_source(tmp_path, _IMPORTS + source, **options)


@pytest.mark.parametrize(
    ("version", "in_config", "asked", "dtype"),
    [
        ("5.23.0", None, "", "float32"),
        ("5.23.0", "bfloat16", "", "bfloat16"),
        ("5.23.0", "bfloat16", "dtype=torch.float16", "float16"),
        ("4.57.1", "bfloat16", "", "float32"),
        ("4.57.1", "bfloat16", "torch_dtype='auto'", "bfloat16"),
        ("4.57.1", "bfloat16", "torch_dtype=torch.float16", "float16"),
    ],
)
def test_the_dtype_of_the_weights_follows_the_release(folder, tmp_path, monkeypatch, version, in_config, asked, dtype):
    # Sources: "dtype" in the documentation of from_pretrained, 4.57 (float32 by default) and 5.0 ("auto").
    monkeypatch.setattr("memscope.simulation.machine.pretrained.version", lambda name: version)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "torch_dtype": in_config}))
    source = f"""
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}{", " if asked else ""}{asked})
assert model.dtype is torch.{dtype}, model.dtype
assert not model.training and not model.lm_head.weight.is_cuda
train(nn.Linear(64, 64).cuda())
"""
    assert "the weights of pretrained models were not read" in simulated(tmp_path, source).notes[0]


def test_weights_that_cannot_be_read_are_not_opened_and_only_a_header_tells_the_dtype(folder, tmp_path):
    header = json.dumps({"weight": {"dtype": "F16", "shape": [64, 32], "data_offsets": [0, 4096]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)  # and not one weight
    source = f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
    simulated(tmp_path, source + "assert model.dtype is torch.float16\ntrain(nn.Linear(64, 64).cuda())")
    (folder / "model.safetensors").write_bytes(b"unreadable")
    (folder / "config.json").write_text(json.dumps({**LLAMA, "torch_dtype": "bfloat16"}))
    simulated(tmp_path, source + "assert model.dtype is torch.bfloat16\ntrain(nn.Linear(64, 64).cuda())")


@pytest.mark.parametrize("device_map", ["'cuda'", "'auto'", "{'': 0}", "'cuda:0'", "0"])
def test_a_device_map_takes_all_weights_as_one_block_first(folder, tmp_path, device_map):
    source = f"""
assert torch.cuda.memory_allocated() == 0
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32, device_map={device_map})
assert all(weight.is_cuda for weight in model.parameters())
train(nn.Linear(64, 64).cuda())
"""
    ran = simulated(tmp_path, source)
    assert ran.trace.size[0] == -(-WEIGHTS * 4 // 512) * 512  # taken as float16 numbers, in blocks of 512 bytes
    assert "caching_allocator_warmup" in ran.notes[1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("quantization_config=BitsAndBytesConfig(load_in_4bit=True)", r"quantized weights \(quantization_config\)"),
        ("device_map={'model': 0, 'lm_head': 'cpu'}", "spreads a model over several devices"),
    ],
)
def test_what_cannot_be_simulated_is_refused(folder, tmp_path, asked, message):
    with pytest.raises(Exception, match=message):
        simulated(tmp_path, f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, {asked})")


def test_a_head_for_labels_is_built_and_trains(folder, tmp_path):
    source = f"""
model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, num_labels=5, pad_token_id=0).cuda()
assert model.score.out_features == 5
model.train()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(3):
    tokens = torch.randint(1, 64, (2, 8)).cuda()
    model(input_ids=tokens, labels=torch.tensor([0, 4]).cuda()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
    total = WEIGHTS - 64 * 32 + 5 * 32
    assert simulated(tmp_path, source).trace.meta["parameters"] == {"total": total, "trainable": total}


def test_an_adapter_is_loaded_onto_its_model_without_its_weights(folder, tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed")
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    source = f"""
from peft import PeftModel
base = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}, is_trainable=True).cuda()
optimizer = torch.optim.AdamW(weight for weight in model.parameters() if weight.requires_grad)
for _ in range(3):
    tokens = torch.randint(1, 64, (2, 8)).cuda()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
    adapters = 2 * 2 * 2 * 4 * 32  # two layers, two projections of two matrices [4, 32]
    trace = simulated(tmp_path, source).trace
    assert trace.meta["parameters"]["trainable"] == adapters


def test_a_model_of_diffusers_is_built_from_its_configuration(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    config = {
        "_class_name": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": [32, 64], "norm_num_groups": 8, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    source = f"""
from diffusers import UNet2DModel
model = UNet2DModel.from_pretrained({str(tmp_path / "unet")!r}, torch_dtype=torch.bfloat16).cuda()
assert model.conv_in.weight.is_cuda and model.dtype is torch.bfloat16 and not model.training
train(nn.Linear(64, 64).cuda())
"""
    assert "the weights of pretrained models were not read" in run_source(tmp_path, source).notes[0]
