"""What is watched in a program's own process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from memscope.hooks import recorder as hooks_recorder
from memscope.program import watch
from memscope.program.request import Request
from memscope.trace import PHASES


def request(folder: Path, **changes: object) -> Request:
    values = {
        "device": "cpu", "simulated": False, "device_file": None, "allocator": None, "assume": "", "steps": 1,
        "strategies": "", "folder": str(folder), "command": ("python", "train.py"),
    }  # fmt: skip
    return Request(**{**values, **changes})  # type: ignore[arg-type]


class Enough(BaseException):
    pass


def stop() -> None:
    raise Enough


def test_on_a_gpu_the_first_call_is_followed_although_recording_begins_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "require_gpu", lambda: None)
    monkeypatch.setattr(hooks_recorder, "watch_of", lambda device: None)  # of the allocator, which needs a GPU
    watching = watch.begin(request(tmp_path, device="cuda"), stop)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    def train() -> None:
        for _ in range(2):
            loss = model(torch.ones(2, 4)).square().mean()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # built after the first call
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(Enough):
        train()
    trace = watching.finish(None)
    assert trace is not None
    assert trace.modules[:3] == ("(model)", "0", "1")
    forward = trace.phase == PHASES.index("forward")
    assert trace.by("module", at="peak")["1"] >= 8 * 2 * 4 + 2 * 4
    assert [int(size) for size in trace.size[forward]] == [2 * 4 * 4, 2 * 8 * 4, 2 * 2 * 4]  # input, results
    assert watching.steps == 1


def test_a_process_that_only_evaluates_leaves_no_trace(tmp_path: Path) -> None:
    watching = watch.begin(request(tmp_path), stop)
    with torch.no_grad():
        nn.Linear(4, 4)(torch.ones(1, 4))
    assert watching.finish(None) is None
    assert not watching.has_claimed


def test_a_program_that_builds_its_optimizer_anew_for_each_step_is_stopped_too(tmp_path: Path) -> None:
    watching = watch.begin(request(tmp_path, steps=2), stop)
    model = nn.Linear(4, 4)

    def train() -> None:
        for _ in range(100):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(torch.ones(1, 4)).mean().backward()
            optimizer.step()

    with pytest.raises(Enough):
        train()
    trace = watching.finish(None)
    assert trace is not None
    assert len(trace.steps) == 2 * 8


@pytest.mark.parametrize("evaluates", [False, True], ids=["another step", "evaluation"])
def test_a_program_that_is_late_is_stopped_when_its_step_is_complete(tmp_path: Path, evaluates: bool) -> None:
    watching = watch.begin(request(tmp_path, steps=None, deadline=0.0), stop)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        while True:
            for _ in range(2):  # micro-batches of the first step, which is completed
                model(torch.ones(1, 4)).mean().backward()
            optimizer.step()
            with torch.set_grad_enabled(not evaluates):
                model(torch.ones(1, 4))

    with pytest.raises(Enough):
        train()
    assert watching.is_late
    trace = watching.finish(None)
    assert trace is not None
    assert trace.steps == (0,)
    assert len(trace.meta["seconds"]) == 1
    assert int((trace.phase == PHASES.index("inference")).sum()) == 0


@pytest.mark.parametrize(
    ("ends", "ran_out"),
    [(None, None), (torch.OutOfMemoryError("no room"), True), (ValueError("other"), False)],
    ids=["by itself", "out of memory", "another error"],
)
def test_a_program_that_ends_within_a_step_may_have_caught_that_memory_ran_out(
    tmp_path: Path, ends: BaseException | None, ran_out: bool | None
) -> None:
    watching = watch.begin(request(tmp_path), stop)
    nn.Linear(4, 4)(torch.ones(1, 4)).mean().backward()
    watching.finish(ends)
    assert watching._recorder._ran_out is ran_out


def test_a_compiled_model_has_the_names_of_the_original(tmp_path: Path) -> None:
    watching = watch.begin(request(tmp_path), stop)
    model = nn.Sequential(nn.Linear(4, 8), torch.compile(nn.Sequential(nn.Linear(8, 2))))
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(torch.ones(2, 4)).mean().backward()
    optimizer.step()
    trace = watching.finish(None)
    assert trace is not None
    assert trace.meta["models"] == {"(model)": "Sequential"}
    born = {trace.modules[code] for code in trace.module}
    assert born == {"(model)", "0", "1.0"}


def test_what_no_module_runs_belongs_to_the_model_that_was_called_last(tmp_path: Path) -> None:
    watching = watch.begin(request(tmp_path), stop)
    teacher, student = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with torch.no_grad():
        wanted = teacher(torch.ones(8, 4))
    loss = (student(torch.ones(8, 4)) - wanted).square()
    loss.mean().backward()
    optimizer.step()
    trace = watching.finish(None)
    assert trace is not None
    squares = [trace.modules[code] for code, op in zip(trace.module, trace.op, strict=True) if "pow" in trace.ops[op]]
    assert set(squares) == {"Sequential"}
