"""`memscope fit`: the document, the page, and the command that follows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from memscope.strategies import Plan

SMALL = """
[small]
vendor_name = "a GPU of 400 MiB"
capability = "8.0"
capacity_bytes = 419_430_400
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
ON_SMALL = ("--device", "small", "--device-file", "small.toml")
KEYS = {
    "schema_version", "target", "device", "fits", "peak", "largest", "evidence", "devices", "changes", "assumptions",
    "notes",
}  # fmt: skip


@pytest.fixture
def folder(run, tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TARGET)
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path


def test_what_does_not_fit_gets_changes_and_a_next_command_that_fits(run, folder):
    code, out, err = run("fit", "mine.py", *ON_SMALL, "-s", "adamw:foreach", "--html", "page.html")
    assert code == 3, err
    assert "It does not fit. Micro-batch 16 needs" in out
    assert "runs out of memory)" in out  # the neighbour of the largest micro-batch
    assert "Cheapest changes that make it fit" in out
    page = (folder / "page.html").read_text()
    assert "data-figure=" in page
    assert "rtx4090" in page
    (line,) = [line for line in out.splitlines() if line.startswith("Next: memscope profile")]
    words = shlex.split(line.removeprefix("Next: memscope "))
    assert words[:2] == ["profile", "mine.py"]
    code, out, err = run(*words, "--json", "-o", "changed")
    assert code == 0, err  # 4: the last run does not fit


def test_the_document_of_a_model_of_hugging_face(run, folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = ["-s", "adamw:foreach", "--set", "seq_len=100", "attention=eager", "micro_batch=2"]
    code, out, err = run("fit", "hf:config.json", *ON_SMALL, *words, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert set(told) == KEYS
    assert (told["schema_version"], told["device"], told["fits"]) == (1, "small", True)
    assert told["largest"]["seq_len"] == 192  # the model's positions
    most = told["largest"]["micro_batch"]
    by_batch = {one["micro_batch"]: one["fits"] for one in told["evidence"] if one["seq_len"] == 100}
    assert (by_batch[2], by_batch[most], by_batch[most + 1]) == (True, True, False)
    (asked,) = [one for one in told["evidence"] if (one["micro_batch"], one["seq_len"]) == (2, 100)]
    assert asked["device_bytes"] == told["peak"]["device"] == told["peak"]["reserved"]  # this device has no context
    assert [one["fits"] for one in told["devices"] if one["name"] in ("small", "b200")] == [True, True]
    assert told["changes"] == []


def test_changes_are_texts_of_strategies(run, folder):
    code, out, err = run("fit", "mine.py", *ON_SMALL, "-s", "adamw:foreach,ga:steps=1", "--json")
    assert code == 3, err
    changes = json.loads(out)["changes"]
    assert changes
    assert [one["step_seconds"] for one in changes] == sorted(one["step_seconds"] for one in changes)
    for one in changes:
        assert {"adamw:foreach", "ga:steps=1"} <= set(Plan.parse(one["strategies"]).specs)
        assert one["device_bytes"] <= 419_430_400
