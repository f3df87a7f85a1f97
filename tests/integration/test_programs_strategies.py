"""Strategies on unchanged programs: the effect is that of the same change written by hand."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from memscope.program.command_line import resolve_program
from memscope.program.launch import launch
from memscope.program.request import Request

PROGRAMS = Path(__file__).parents[1] / "programs"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The trace of two steps of a program, with a plan, on a device."""
    monkeypatch.chdir(tmp_path)

    def trace_of(program, plan="", *, device="a100-80gb", simulated=True):
        folder = tmp_path / f"scratch-{len(os.listdir(tmp_path))}"
        folder.mkdir()
        command = resolve_program([sys.executable, str(program)])
        request = Request(device, simulated, None, None, "", 2, plan, str(folder), command.words)
        end = launch(command, request, log=folder / "log")
        if end.error is not None:
            raise end.error
        return end.trace

    return trace_of


def by_hand(tmp_path, name, *changes):
    """A program of which some lines are written otherwise."""
    source = (PROGRAMS / name).read_text()
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    path = tmp_path / f"by_hand_{name}"
    path.write_text(source)
    return path


@pytest.mark.parametrize(("device", "simulated"), [("a100-80gb", True), ("cpu", False)])
def test_checkpointing_is_that_written_by_hand_allocation_by_allocation(run, tmp_path, device, simulated):
    written = by_hand(
        tmp_path,
        "nanogpt.py",
        ("x = block(x)", "x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)"),
        ("import torch.nn as nn", "import torch.nn as nn\nimport torch.utils.checkpoint"),
    )
    found = run(PROGRAMS / "nanogpt.py", "ckpt", device=device, simulated=simulated)
    expected = run(written, device=device, simulated=simulated)
    assert found.peak.allocated_bytes == expected.peak.allocated_bytes
    assert np.array_equal(found.requested, expected.requested)
    assert found.meta["strategies"] == ["ckpt"]
    if simulated:
        assert found.meta["peak_reserved"] == expected.meta["peak_reserved"]


def test_frozen_weights_have_neither_gradients_nor_optimizer_state(run):
    trace = run(PROGRAMS / "mnist.py", "lora:targets=fc1,r=2")
    adapters = 4 * 2 * (9216 + 128)
    assert trace.meta["parameters"]["trainable"] == adapters // 4
    at_peak = trace.by_category(trace.peak.event)
    assert at_peak["gradient"] == adapters
    # Adadelta keeps two averages of each parameter; its step counters are on the host (torch/optim/adadelta.py).
    assert at_peak["optimizer_state"] == 2 * adapters
