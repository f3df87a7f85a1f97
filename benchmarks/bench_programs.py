"""What `memscope profile -- python train.py` costs, beside the same training written as a target.

The Trainer of transformers on a configuration of LLaMA-7B (2 sequences of 2,048 tokens, twice accumulated, bf16
autocast, gradient checkpointing), its target `hf:FOLDER` with the same settings, and a script in the manner of nanoGPT.
Each command starts from the shell, with the imports of its libraries; the bounds are those of two quiet cores.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

PROGRAMS = Path(__file__).parents[1] / "tests" / "programs"
MEMSCOPE = (sys.executable, "-m", "memscope", "profile", "--device", "h100-80gb", "--json")
MOST_SECONDS_OF_TRAINER, MOST_SECONDS_OF_SCRIPT, MOST_SECONDS_ABOVE_TARGET = 40, 12, 3
MOST_HOST_BYTES = 3 * 2**29

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip
SETTINGS = (
    "micro_batch=2", "accumulation=2", "seq_len=2048", "gradient_checkpointing=true", "optimizer=adamw_torch_fused",
    "clip_grad_norm=1.0", "use_cache=false",
)  # fmt: skip


class Done(NamedTuple):
    """One command."""

    seconds: float
    peak_bytes: int
    """Peak allocated bytes of its last run."""


def profile(*words: str, folder: Path) -> Done:
    """Run a profile in a folder of its own."""
    folder.mkdir()
    began = time.perf_counter()
    done = subprocess.run([*MEMSCOPE, *words], cwd=folder, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    return Done(seconds, json.loads(done.stdout)["runs"][-1]["peak"]["allocated"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but a configuration."""
    folder = tmp_path_factory.mktemp("llama-7b")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_trainer_on_7b(benchmark: BenchmarkFixture, model: Path, tmp_path: Path) -> None:
    script = str(PROGRAMS / "hf_trainer.py")

    def program() -> Done:
        return profile("--", sys.executable, script, str(model), "2048", folder=tmp_path / "program")

    of_program = benchmark.pedantic(program, rounds=1, iterations=1)
    host_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    of_target = profile(f"hf:{model}", *SETTINGS, "-s", "amp:dtype=bf16", folder=tmp_path / "target")
    benchmark.extra_info.update(
        seconds=of_program.seconds, seconds_of_target=of_target.seconds, host_bytes=host_bytes,
        peak_bytes=of_program.peak_bytes, peak_bytes_of_target=of_target.peak_bytes,
    )  # fmt: skip
    assert of_program.seconds <= MOST_SECONDS_OF_TRAINER
    assert host_bytes <= MOST_HOST_BYTES
    assert of_program.seconds - of_target.seconds <= MOST_SECONDS_ABOVE_TARGET
    # The Trainer makes no attention mask; the target does. All else that is alive at the peak is the same.
    assert of_program.peak_bytes == pytest.approx(of_target.peak_bytes, rel=1e-5)


def test_script_like_nanogpt(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    words = ("--", sys.executable, str(PROGRAMS / "nanogpt.py"))
    done = benchmark.pedantic(profile, words, {"folder": tmp_path / "program"}, rounds=1, iterations=1)
    assert done.seconds <= MOST_SECONDS_OF_SCRIPT
