"""Fine-tuning on a GPU: peak memory is measured, and a stopped run is resumed exactly where it was."""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest
import torch
from finetunes import LORA, TOGETHER, at_call, losses, metrics, run, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


FP16 = f"{LORA},amp:dtype=fp16"
"""With a gradient scaler, whose state a checkpoint holds too."""


@pytest.mark.parametrize("plan", [TOGETHER, FP16], ids=["bf16 and checkpoints", "fp16 with a scaler"])
def test_a_stopped_run_is_resumed_on_a_gpu(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = small(device="cuda", strategies=plan)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    # 2 held-out samples, then 2 calls a step: in the middle of step 3.
    with monkeypatch.context() as patched:
        at_call(patched, 2 + 5, lambda: signal.raise_signal(signal.SIGINT))
        assert run(*words, "-o", str(stopped)) == 130
    assert run("--resume", str(stopped)) == 0
    assert run(*words, "-o", str(whole)) == 0
    # The dropout of step 4 must be that of the whole run; sums of atomic additions may differ in the last places.
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-4)
    scales = [[line.get("grad_scale") for line in metrics(folder) if "loss" in line] for folder in (stopped, whole)]
    assert scales[0] == scales[1]
    assert all((scale is not None) == (plan == FP16) for scale in scales[0])
    peaks = [line["peak_bytes"] for line in metrics(whole) if "loss" in line]
    weights = 4 * 92_320  # bytes of the small model in float32, without the updates
    assert all(weights < peak <= torch.cuda.get_device_properties(0).total_memory for peak in peaks)
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("plan", [FP16, "amp:dtype=bf16", ""], ids=["lora, fp16", "all weights, bf16", "all weights"])
def test_the_losses_equal_those_on_a_cpu(plan: str, tmp_path: Path) -> None:
    plan = plan.replace("dropout=0.05", "dropout=0")  # a GPU generates other random numbers than a CPU
    for device in ("cuda", "cpu"):
        assert run(*small(device=device, strategies=plan), "-o", str(tmp_path / device)) == 0
    # float16 has 11 bits of precision, bfloat16 8: a few parts in a thousand of a product.
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2 if plan else 1e-3)


def test_only_the_training_is_left_on_the_device(tmp_path: Path) -> None:
    run(*small(device="cuda", strategies=FP16), "-o", str(tmp_path / "first"))
    gc.collect()
    before = torch.cuda.memory_allocated()
    run(*small(device="cuda", strategies=FP16), "-o", str(tmp_path / "second"))
    gc.collect()
    assert torch.cuda.memory_allocated() == before
