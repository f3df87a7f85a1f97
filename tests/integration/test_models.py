"""One model of each kind in the matrix of docs/models.md: its simulated step on a CPU is the recorded one."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
if find_spec("peft") is None:  # its import takes seconds, of each process that collects the tests
    pytest.skip("PEFT is not installed", allow_module_level=True)

from architectures.matrix import ROWS, allocations
from architectures.row import Mode

from memscope import record, simulate

CHOSEN = [
    "GPT-2", "Gemma 3", "gpt-oss", "Jamba", "ELECTRA", "BART", "Swin", "ResNet", "CLIP", "Qwen2.5-VL", "Wav2Vec2",
    "UNet (DDPM)", "GAT",
]  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_a_simulated_step_equals_the_recorded_one(name, tmp_path):
    build = ROWS[name].how.build("tiny", Mode(), tmp_path)
    found = []
    for trace in (record, lambda built: simulate(built, device="cpu")):
        torch.manual_seed(0)
        np.random.seed(0)  # transformers draws the masked frames of a speech model with it
        found.append(allocations(trace(build)))
    assert found[0] == found[1]
