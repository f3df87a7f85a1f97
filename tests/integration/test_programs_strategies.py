"""Strategies on unchanged programs: the effect is that of the same change written by hand."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
from program_runs import PROGRAMS, run_program

from memscope.cli.main import main


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
def test_checkpointing_is_that_written_by_hand_allocation_by_allocation(tmp_path, monkeypatch, device, simulated):
    monkeypatch.chdir(tmp_path)  # the program writes its text here
    written = by_hand(
        tmp_path,
        "nanogpt.py",
        ("x = block(x)", "x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)"),
        ("import torch.nn as nn", "import torch.nn as nn\nimport torch.utils.checkpoint"),
    )
    found = run_program(PROGRAMS / "nanogpt.py", plan="ckpt", device=device, simulated=simulated).trace
    expected = run_program(written, device=device, simulated=simulated).trace
    assert found.peak.allocated_bytes == expected.peak.allocated_bytes
    assert np.array_equal(found.requested, expected.requested)
    assert found.meta["strategies"] == ["ckpt"]
    if simulated:
        assert found.meta["peak_reserved"] == expected.meta["peak_reserved"]


def test_frozen_weights_have_neither_gradients_nor_optimizer_state():
    trace = run_program(PROGRAMS / "mnist.py", plan="lora:targets=fc1,r=2").trace
    adapters = 4 * 2 * (9216 + 128)
    assert trace.meta["parameters"]["trainable"] == adapters // 4
    at_peak = trace.by_category(trace.peak.event)
    assert at_peak["gradient"] == adapters
    # Adadelta keeps two averages of each parameter; its step counters are on the host (torch/optim/adadelta.py).
    assert at_peak["optimizer_state"] == 2 * adapters


def test_advise_runs_the_program_again_for_each_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["advise", "--budget", "1GB", "-s", "optim:foreach=false", "--json", "--", sys.executable]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main([*words, str(PROGRAMS / "nanogpt.py")])
    assert not end.value.code
    document = json.loads(out.getvalue())
    assert document["target"] == "nanogpt.py"
    assert document["feasible"]
    assert document["plan"] == {"strategies": ["optim:foreach=false"], "layers": {}, "file": None}
    # The other runs: every layer checkpointed. A scaler is in the way of bf16, and lora is not allowed.
    assert document["notes"][0].startswith("The program was run 2 times, once for each plan that was tried. ")
    assert document["time"]["overhead_vs_all"] < 0
    assert document["combinations"] == {"simulated": 1, "all": 1, "untried": []}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["targets/llama2"], '"targets/llama2" stands before --: advise takes a target or a program, not both'),
        (["--preset", "debug"], "--preset is for targets"),
        (["--device", "gpu"], 'the rates of device "gpu" are not known'),
        (["-s", "ckpt:auto"], "ckpt:auto is what memscope advise finds"),
    ],
)
def test_options_that_a_program_cannot_have_are_refused_before_it_runs(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["advise", "--budget", "1GB", *options, "--", sys.executable, "-c", "print('ran')"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "ran\n" not in told
