"""What would help a program that does not fit: which strategies it is run again with, and what is told of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memscope import simulate
from memscope.errors import TargetError
from memscope.program import would_help as helping
from memscope.program.command_line import CommandLine
from memscope.program.launch import ProgramEnd
from memscope.program.request import Offer, Offers, Request
from memscope.program.would_help import would_help
from memscope.simulation.devices.catalogue import get_device, load_devices
from memscope.testing import toy_workload
from memscope.trace import Trace

PROGRAM = CommandLine(("python", "train.py"), "python", "train.py")
OFFERS = Offers((Offer("bf16", False), Offer("lora:r=4", False), Offer("lora", False), Offer("ckpt", True)))
SMALL = "gpu:1MiB"


def simulated(request: Request) -> Trace:
    """The toy as a program would be simulated."""
    device = get_device(request.device, load_devices(Path(request.device_file)) if request.device_file else None)
    return simulate(toy_workload, device=device, strategies=request.strategies, steps=1)


@pytest.fixture
def asked(tmp_path: Path) -> Request:
    """What was asked of a run that does not fit."""
    return Request(SMALL, True, None, None, "", 1, "", str(tmp_path), PROGRAM.words, asks=True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests of the runs, which simulate the toy. With bf16 the program fails."""
    requests: list[Request] = []

    def launch(program: CommandLine, request: Request, **more: Any) -> ProgramEnd:
        requests.append(request)
        if "bf16" in request.strategies:
            return ProgramEnd(1, None, TargetError("train.py failed\nIts output (log) ends with:\n…"))
        return ProgramEnd(0, simulated(request), None, OFFERS if request.asks else None)

    monkeypatch.setattr(helping, "launch", launch)
    return requests


def told(name: str, done: int, total: int) -> None:
    """Progress."""


def test_a_program_is_run_once_with_each_strategy_that_it_can_take(asked: Request, launched: list[Request]) -> None:
    before = simulated(asked)
    found = would_help(PROGRAM, asked, ProgramEnd(0, before, None, OFFERS), told)
    assert [one.strategies for one in launched] == ["ckpt", "bf16", "lora"], "exact ones first, defaults first"
    assert found.failed == {"bf16": "train.py failed"}, "the log is gone"
    freed = {one.strategy.spec: one for one in found.tried}
    with_lora = simulate(toy_workload, device=get_device(SMALL), strategies="lora", steps=1)
    assert freed["lora"].change_bytes == with_lora.peak.allocated_bytes - before.peak.allocated_bytes
    assert (freed["lora"].is_exact, freed["ckpt"].is_exact) == (False, True)
    assert len({one.folder for one in launched}) == 3


def test_strategies_of_the_plan_are_not_tried_again_and_stay(asked: Request, launched: list[Request]) -> None:
    asked = replace(asked, strategies="ckpt")
    would_help(PROGRAM, asked, ProgramEnd(0, simulated(asked), None, OFFERS), told)
    assert [one.strategies for one in launched] == ["bf16,ckpt", "lora,ckpt"]


def test_strategies_for_which_there_is_no_time_are_named(asked: Request, launched: list[Request]) -> None:
    found = would_help(PROGRAM, asked, ProgramEnd(0, simulated(asked), None, OFFERS), told, most_seconds=0)
    assert (launched, found.tried) == ([], ())
    assert found.failed == dict.fromkeys(["ckpt", "bf16", "lora"], "those before it took 0 s")


def test_a_measured_run_is_simulated_first_on_the_same_gpu_with_the_memory_it_had(
    asked: Request, launched: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUBLAS_WORKSPACE_CACHE", "1")  # as before PyTorch 2.15
    ran_out = simulated(asked)
    measured = replace(ran_out, meta={**ran_out.meta, "out_of_memory": {"limit": 2**28}})
    gpu = SimpleNamespace(name="NVIDIA X", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    asked = replace(asked, simulated=False, device="cuda", asks=False)
    found = would_help(PROGRAM, asked, ProgramEnd(1, measured, None), told)
    assert [one.strategies for one in launched] == ["", "ckpt", "bf16", "lora"]
    assert {(one.simulated, one.device) for one in launched} == {(True, "this-gpu")}
    one = found.tried[0]
    assert one.trace.meta["capacity"] == 2**28
    # On compute capability 9.0 a workspace of cuBLAS differs, so that the program itself is simulated again.
    assert one.before_bytes != ran_out.peak.allocated_bytes
