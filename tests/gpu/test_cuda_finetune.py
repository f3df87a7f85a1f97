"""Fine-tuning on a GPU: peak memory is measured, and a run that was stopped goes on where it was."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from finetunes import TOGETHER, at_call, losses, metrics, run, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_stopped_run_goes_on_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = small(device="cuda", strategies=TOGETHER)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    # 2 held-out samples, then 2 calls a step: in the middle of step 3.
    with monkeypatch.context() as patched:
        at_call(patched, 2 + 5, lambda: signal.raise_signal(signal.SIGINT))
        assert run(*words, "-o", str(stopped)) == 130
    assert run("--resume", str(stopped)) == 0
    assert run(*words, "-o", str(whole)) == 0
    # The dropout of step 4 must be that of the whole run; sums of atomic additions may differ in the last places.
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-4)
    peaks = [line["peak_bytes"] for line in metrics(whole) if "loss" in line]
    weights = 4 * 92_320  # bytes of the small model in float32, without the updates
    assert all(weights < peak <= torch.cuda.get_device_properties(0).total_memory for peak in peaks)
    assert peaks == sorted(peaks)
