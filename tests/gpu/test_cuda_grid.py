"""Table 2 measured on a GPU: each combination in its own process, and a limit to represent a smaller card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_gpu import nearest_device

from memscope.analysis.grid import Grid, combinations, table2
from memscope.runs.plans import RunSpec, run_where_there_is_room
from memscope.strategies import read_alternatives, read_strategies
from memscope.trace import Trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch finds none"),
]

SETTINGS = {"n_layers": "2", "accumulation": "2", "seq_len": "32"}
WIDE = {**SETTINGS, "n_layers": "4", "dim": "1024", "n_heads": "8"}
WEIGHTS = 4 * (4 * (4 * 1024**2 + 3 * 1024 * 2752 + 2 * 1024) + 2 * 1024**2 + 1024)
"""Bytes of the wide model in float32, 211 MB: 4 layers, embedding and head of 1024 rows, norms."""


def grid_of(
    text: str, folder: Path, settings: dict[str, str], device: str = "cuda", memory_bytes: int | None = None
) -> Grid:
    """Table 2 as computed by `memscope profile --grid`."""
    factors = read_strategies(text)
    found = combinations(read_alternatives(text))
    applied, plans = [one.applied for one in found], [one.plan for one in found]
    first = RunSpec(
        target="llama2",
        preset="debug",
        settings=settings,
        plan="",
        compared=(str(plans[-1]),),
        device=device,
        device_file=None,
        allocator=None,
        simulated=device != "cuda",
        steps=2,
        path=folder,
        memory_bytes=memory_bytes,
    )
    specs = [
        dataclasses.replace(first, plan=str(plan), path=folder / f"{device}-{index}.npz")
        for index, plan in enumerate(plans)
    ]
    assert not run_where_there_is_room(specs, lambda *state: None).failed
    traces = [Trace.load(spec.path) if spec.path.exists() else None for spec in specs]
    return table2(factors, list(zip(applied, traces, strict=True)), 20, memory_bytes)


def test_every_combination_is_measured_and_was_predicted(tmp_path: Path) -> None:
    text = "ga:steps=2,amp:dtype=bf16,lora"
    measured = grid_of(text, tmp_path, SETTINGS)
    predicted = grid_of(text, tmp_path, SETTINGS, nearest_device())
    assert (measured.predicted, predicted.predicted) == (False, True)
    assert measured.device == torch.cuda.get_device_name()
    assert (measured.samples_per_step, measured.steps) == (2, 10)
    assert len(measured.cells) == 8
    for real, guess in zip(measured.cells, predicted.cells, strict=True):
        assert real.applied == guess.applied
        assert real.fits
        assert real.seconds is not None
        assert real.seconds > 0
        assert guess.allocated_bytes == pytest.approx(real.allocated_bytes, rel=0.005)
        assert guess.reserved_bytes == pytest.approx(real.reserved_bytes, rel=0.005)


def test_with_a_gradient_scaler_too(tmp_path: Path) -> None:
    plain, amp = grid_of("amp", tmp_path, SETTINGS).cells
    assert plain.fits
    assert amp.fits
    assert amp.allocated_bytes


def test_on_a_smaller_card_a_combination_runs_out(tmp_path: Path) -> None:
    # Training all weights takes four times their bytes, with gradients and two moments. LoRA adds little to them.
    plain, lora = grid_of("lora", tmp_path, WIDE, memory_bytes=600_000_000).cells
    assert not plain.fits
    assert plain.allocated_bytes is plain.seconds is None
    assert lora.fits
    assert lora.reserved_bytes is not None
    assert WEIGHTS < lora.reserved_bytes <= 600_000_000


def test_without_room_for_the_weights_there_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the weights do not fit in any combination"):
        grid_of("lora", tmp_path, WIDE, memory_bytes=100_000_000)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly", reason="plotly, which draws the page, is not installed")
    from memscope.cli.main import main

    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    words = ["profile", "llama2", "--preset", "debug", "--set", *settings, "--device", "cuda", "--grid", "lora"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--memory", "2GB", "-o", str(tmp_path / "out"), "--json"])
    out, err = capsys.readouterr()
    assert not end.value.code, err
    document: dict[str, Any] = json.loads(out)
    assert document["device"] == {"name": torch.cuda.get_device_name(), "simulated": False}
    assert document["memory_limit"] == 2_000_000_000
    assert [row["fits"] for row in document["table2"]] == [True, True]
    assert all(row["seconds"] > 0 and row["peak"]["allocated"] for row in document["table2"])
