"""`memscope fit`: the document, the page, and the command that follows."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from pathlib import Path

import pytest
from skill import lacking

from memscope.advisor.fit.fit import answer
from memscope.advisor.fit.fitting import Largest, Size
from memscope.advisor.fit.names import SizeNames
from memscope.advisor.fit.question import Question
from memscope.advisor.measure.runner import Asker, Scene
from memscope.allocator.settings import AllocatorSettings
from memscope.simulation.devices.catalogue import load_devices
from memscope.strategies import Plan

CAPACITY = 480 * 2**20

SMALL = """
[small]
vendor_name = "a GPU of 480 MiB"
capability = "8.0"
capacity_bytes = 503_316_480
multiprocessors = 108
bandwidth_bytes_per_second = 1e12
peak_flops_per_second = { fp32 = 1e13 }
"""
TARGET = """
import dataclasses, torch
from memscope import Workload


@dataclasses.dataclass(frozen=True)
class Config:
    batch_size: int = 16


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(256, 4096), torch.nn.Linear(4096, 256)

    def forward(self, x):
        return x + self.narrow(torch.nn.functional.gelu(self.wide(x)))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def build(config):
    return Workload(
        model=Model(), batches=[torch.ones(256 * config.batch_size, 256)],
        loss=lambda m, x: m(x).square().mean(), optimizer_factory=torch.optim.AdamW, name="mine",
    )
"""
ON_SMALL = ("--device", "small:480MiB", "--device-file", "small.toml")
KEYS = {
    "schema_version", "target", "device", "fits", "fit", "peak", "largest", "evidence", "devices", "changes",
    "assumptions", "notes",
}  # fmt: skip


@pytest.fixture
def folder(run, tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TARGET)
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path


def test_what_does_not_fit_gets_changes_and_a_next_command_that_fits(run, folder):
    words = ["-s", "optim,ga:steps=1", "--json", "--html", "page.html"]
    code, out, err = run("fit", "mine.py", *ON_SMALL, *words)
    assert code == 3, err
    told = json.loads(out)
    assert set(told) == KEYS
    assert lacking(told, "fit") == []
    assert (told["schema_version"], told["device"], told["fits"]) == (1, "small:480MiB", False)
    assert told["peak"]["device"] == told["peak"]["reserved"] > CAPACITY  # this device has no context
    most = told["largest"]["micro_batch"]
    by_batch = {one["micro_batch"]: one["fits"] for one in told["evidence"]}
    assert (by_batch[most], by_batch[most + 1], by_batch[16]) == (True, False, False)
    assert told["largest"]["seq_len"] is None
    assert [one["fits"] for one in told["devices"] if one["name"] in ("small", "b200")] == [False, True]
    assert told["changes"]
    for one in told["changes"]:
        assert {"optim", "ga:steps=1"} <= set(Plan.parse(one["strategies"]).specs)
        assert one["device_bytes"] <= CAPACITY
    assert [one["step_seconds"] for one in told["changes"]] == sorted(one["step_seconds"] for one in told["changes"])
    page = (folder / "page.html").read_text()
    assert "data-figure=" in page
    assert "rtx4090" in page
    (following,) = re.findall(r'Next: <code class="command">memscope (.*?)</code>', page)
    words = shlex.split(unescape(following))
    assert words[:2] == ["profile", "mine.py"]
    assert words[-1] == told["changes"][0]["strategies"]
    code, out, err = run(*words, "--json", "-o", "changed")
    assert code == 0, err  # 4: the last run does not fit


def test_a_model_of_hugging_face_ends_at_its_positions(folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1536, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"seq_len": "100", "micro_batch": "64", "attention": "eager"}
    scene = Scene("hf:config.json", None, settings, "small", folder / "small.toml")
    device = load_devices(folder / "small.toml")["small"]
    question = Question(SizeNames("micro_batch", "seq_len"), None, device, "", (), AllocatorSettings(), devices=())
    found = answer(question, Asker(scene.in_process(), lambda what, done, needed: None), scene.build)
    assert (found.asked.size, found.fits) == (Size(64, 100), True)
    assert found.seq_len == Largest(192, 64, None, "the model has 192 positions")
    assert found.micro_batch.next == found.micro_batch.value + 1
