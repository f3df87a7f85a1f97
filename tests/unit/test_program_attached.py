"""Memscope in the Python of a program: attaching, claiming the run, ends that the program does not choose.

Programs that need no real torch run with an empty module of that name, so that their Python starts at once.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memscope import __version__, record, simulate
from memscope.cli.main import main
from memscope.errors import UsageError
from memscope.program import launch as launching
from memscope.program.attached import _refuse_many_processes
from memscope.program.command_line import CommandLine
from memscope.program.launch import launch
from memscope.program.request import Failure, ProgramOutcome, Request
from memscope.program.scratch import Scratch
from memscope.runs.would_free import Remedies, WouldFree
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies import Plan
from memscope.testing import toy_workload

SITE = Path(launching.__file__).parent / "_site"


@pytest.fixture
def request_(tmp_path):
    """A request for one step on the CPU; its scratch folder."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    request = Request("cpu", False, None, None, "", 1, "", str(folder), ("train",))
    request.write(Scratch(folder).request)
    return request


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder of modules that precede the installed ones: an empty torch, and what a test adds."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "torch.py").touch()
    monkeypatch.chdir(folder)  # `python -c` looks for modules here first
    return folder


def python(request: Request, modules: Path, code: str, *more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{modules}"}
    env["MEMSCOPE_PROGRAM"] = str(Scratch(Path(request.folder)).request)
    return subprocess.run([sys.executable, "-c", code, *more], env=env, capture_output=True, text=True)


def memscope_that(modules: Path, attaches: str, version: str = __version__) -> None:
    """A memscope whose `attach` is a line of Python."""
    (modules / "memscope/program").mkdir(parents=True)
    (modules / "memscope/__init__.py").write_text(f"__version__ = {version!r}\n")
    (modules / "memscope/program/__init__.py").touch()
    (modules / "memscope/program/attached.py").write_text(f"def attach():\n    {attaches}\n")


def test_memscope_attaches_once_when_the_outermost_import_of_torch_returns(request_, modules):
    memscope_that(modules, "import library; print('attached', library.ready)")
    (modules / "library.py").write_text("ready = False\nimport torch\nprint('imports')\nready = True\n")
    done = python(request_, modules, "import json; print('begins'); import library, torch, decimal; print('ends')")
    assert done.stdout.split() == ["begins", "imports", "attached", "True", "ends"], done.stderr


def test_the_path_and_sitecustomize_of_the_program_are_its_own(request_, modules):
    (modules / "sitecustomize.py").write_text("print('site of', __name__, __file__)")
    done = python(request_, modules, f"import sys; print({str(SITE)!r} in sys.path, 'memscope' in sys.modules)")
    assert done.stdout.splitlines() == [f"site of sitecustomize {modules / 'sitecustomize.py'}", "False False"]


@pytest.mark.parametrize("code", ["from multiprocessing.spawn import spawn_main; import torch", "import torch"])
def test_workers_of_multiprocessing_are_left_alone(request_, modules, code):
    memscope_that(modules, "print('attached')")
    more = [] if code.startswith("from") else ["--multiprocessing-fork"]
    assert python(request_, modules, code, *more).stdout == ""


@pytest.mark.parametrize(
    ("version", "text", "reason"),
    [
        (None, "raise ImportError('no such thing')", "memscope cannot be imported there (ImportError: no such thing)"),
        ("0.0.1", "", f"it has memscope 0.0.1, but this is memscope {__version__}"),
    ],
    ids=["missing", "another version"],
)
def test_a_python_without_this_memscope_is_named_with_what_to_do(request_, modules, version, text, reason, monkeypatch):
    if version is None:
        (modules / "memscope.py").write_text(text)
    else:
        memscope_that(modules, "pass", version)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    words = (sys.executable, "-c", "import torch; print('goes on')")
    end = launch(CommandLine(words, sys.executable, "train"), request_, log=modules / "log")
    assert end.exit_code == 1
    assert end.trace is None
    assert str(end.error).startswith(f"the program runs {sys.executable}, and {reason}: install it there: ")
    assert "goes on" not in (modules / "log").read_text()


def test_the_first_process_that_trains_claims_the_run_and_the_others_are_listed(request_):
    scratch = Scratch(Path(request_.folder))
    fork = replace(scratch, process=os.getpid() + 1)
    assert (fork.is_fork, scratch.is_fork) == (True, False)
    assert not fork.claim(), "a fork has the hooks of its parent, and would write its results"
    assert not scratch.is_claimed
    assert scratch.claim()
    assert scratch.is_claimed
    assert not Scratch(scratch.folder).claim()
    assert not Scratch(scratch.folder / "removed").claim(), "this process has outlived the launcher"
    Scratch(scratch.folder / "removed").tell_step(1)
    assert [f"process {os.getpid()} (command " in one for one in scratch.others()] == [True]


def test_several_processes_are_refused_with_the_flag_of_their_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _refuse_many_processes()  # a cluster may set this variable alone
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"in 2 processes .*torchrun --nproc-per-node 1"):
        _refuse_many_processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    _refuse_many_processes()


@pytest.fixture(scope="module")
def trace():
    """A trace of one step."""
    return record(toy_workload, steps=1)


def leaves(
    request: Request, outcome: ProgramOutcome, then: str = "pass", others: int = 0, keeps_steps: bool = False
) -> launching.ProgramEnd:
    """The end of a program that leaves an outcome, as an attached one does, and then does something else."""
    scratch = Scratch(Path(request.folder))
    prepared = scratch.folder / "prepared.json"
    outcome.write(prepared)
    for number in range(others):
        me = {"pid": number, "argv": ["python", "actor.py"], "fork": False}
        (scratch.folder / f"other-{number}.json").write_text(json.dumps(me))
    code = f"import os, sys, time; os.rename({str(prepared)!r}, {str(scratch.outcome)!r}); {then}"
    words = (sys.executable, "-c", code)
    return launch(
        CommandLine(words, sys.executable, "train.py"),
        request,
        log=scratch.folder / "log",
        timeout_seconds=60,
        keeps_steps=keeps_steps,
    )


def test_a_program_that_does_not_end_after_its_results_is_ended_and_that_is_said(request_, trace, monkeypatch):
    monkeypatch.setattr(launching, "_PATIENCE_SECONDS", 0.1)
    scratch = Scratch(Path(request_.folder))
    trace.save(scratch.trace)
    end = leaves(request_, ProgramOutcome("stopped", 1, str(scratch.trace)), "time.sleep(600)", others=1)
    assert end.error is None
    assert end.exit_code == 128 + 15
    assert end.trace.meta["target"] == "train.py"
    assert end.trace.meta["notes"][-2:] == [
        "The program did not end within 100 ms of its last step: memscope ended it",
        "Another process of the program trains as well and was not followed: process 0 (command python actor.py)",
    ]
    assert np.array_equal(end.trace.size, trace.size)


@pytest.mark.parametrize(
    ("outcome", "then", "note"),
    [
        (("ended", 1), "pass", "The program ended after 1 optimizer step: 2 were asked for"),
        (("ended", 2), "sys.exit(3)", "The program ended after 2 optimizer steps with an error (exit code 3)"),
        (("stopped", 2), "sys.exit(4)", "After memscope had stopped the program, it ended with an error (exit code 4)"),
        (("stopped", 2), "pass", None),
        (
            ("late", 1),
            "pass",
            "The program was stopped after 1 optimizer step, because --timeout 60.0 s had passed: 2 were asked for",
        ),
    ],
)
def test_an_unusual_end_is_a_note_of_the_trace(request_, trace, outcome, then, note):
    scratch = Scratch(Path(request_.folder))
    trace.save(scratch.trace)
    end = leaves(replace(request_, steps=2), ProgramOutcome(*outcome, str(scratch.trace)), then)
    added = [one for one in end.trace.meta.get("notes", []) if one not in trace.meta.get("notes", [])]
    assert added == ([note] if note else [])


def test_a_program_is_told_its_deadline_only_where_fewer_steps_are_a_result(request_, trace):
    scratch = Scratch(Path(request_.folder))
    trace.save(scratch.trace)
    leaves(request_, ProgramOutcome("ended", 1, str(scratch.trace)))
    assert Request.read(scratch.request).deadline is None, "advise and fit compare whole runs"
    leaves(request_, ProgramOutcome("ended", 1, str(scratch.trace)), keeps_steps=True)
    assert Request.read(scratch.request).deadline > time.monotonic()


def test_a_program_that_does_not_complete_its_step_after_the_timeout_is_ended_with_an_error(request_, monkeypatch):
    monkeypatch.setattr(launching, "_PATIENCE_SECONDS", 0.0)
    Scratch(Path(request_.folder)).tell_step(1)
    words = (sys.executable, "-c", "import time; time.sleep(600)")
    end = launch(CommandLine(words, sys.executable, "train.py"), request_, timeout_seconds=0.1, keeps_steps=True)
    assert str(end.error) == (
        "the program was in step 1 after 100 ms, and was ended (asked for: 1 step): raise --timeout, or choose fewer "
        "--steps"
    )


def test_an_error_of_memscope_in_the_program_is_the_error_of_the_command(request_):
    failure = Failure.of(UsageError("the GPU is busy"), "Traceback of the program")
    end = leaves(request_, ProgramOutcome("failed", 0, failure=failure), "sys.exit(1)")
    assert isinstance(end.error, UsageError)
    assert str(end.error) == "the GPU is busy"
    assert "Traceback of the program" in str(end.error.__cause__)


def test_a_program_that_runs_out_of_memory_in_its_first_step_leaves_its_trace(request_, monkeypatch, tmp_path, capsys):
    ran_out = simulate(toy_workload, device=replace(get_device("gpu"), capacity_bytes=2**23), steps=1)
    assert ran_out.meta["out_of_memory"]
    scratch = Scratch(Path(request_.folder))
    ran_out.save(scratch.trace)
    outcome = ProgramOutcome("failed", 0, str(scratch.trace), exception="torch.OutOfMemoryError: CUDA out of memory")
    end = leaves(request_, outcome, "sys.exit(1)")
    assert end.error is None
    assert "OutOfMemoryError" in end.trace.meta["notes"][-1]
    fits = simulate(toy_workload, device=replace(get_device("gpu"), capacity_bytes=2**32), steps=1)
    helpful = WouldFree(Plan.parse("lora").strategies[0], fits, 2 * fits.peak.allocated_bytes, False)
    monkeypatch.setattr(
        "memscope.cli.profile_program.would_help", lambda *asked, **options: Remedies((helpful,), {"bf16": "no time"})
    )
    monkeypatch.setattr("memscope.cli.profile_program.launch", lambda *asked, **options: end)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["profile", "--device", "cpu", "--json", "-o", "runs", "--", sys.executable, "-c", "pass"])
    assert ended.value.code == 4
    document = json.loads(capsys.readouterr().out)
    assert document["program"]["exit_code"] == 1
    assert document["runs"][0]["out_of_memory"] == ran_out.meta["out_of_memory"]
    assert [one["strategy"] for one in document["runs"][0]["would_free"]] == ["lora"]
    held = document["runs"][0]["alive_when_out_of_memory"]
    assert sum(one["bytes"] for one in held) == ran_out.allocated[ran_out.meta["out_of_memory"]["event"] - 1]
    on_gpu = {**end.trace.meta, "device": {"name": "NVIDIA A100-SXM4-40GB", "simulated": False}}
    end = replace(end, trace=replace(end.trace, meta=on_gpu))
    with pytest.raises(SystemExit):
        main(["profile", "--device", "cpu", "-f", "-o", "runs", "--", sys.executable, "-c", "pass"])
    told = capsys.readouterr().out
    assert "Alive when baseline ran out of memory" in told
    python = sys.executable
    assert "Strategies that would help baseline" in told
    assert "bf16 could not be simulated: no time" in told
    assert f"Next: memscope profile --device a100-40gb --strategies lora -- {python} -c pass\n" in told


def test_a_strategy_that_fails_leaves_the_results_of_the_others(request_, trace, monkeypatch, tmp_path, capsys):
    ends = {"": launching.ProgramEnd(0, trace, None), "lora": launching.ProgramEnd(3, None, UsageError("refused"))}
    asked = []

    def launched(program, request, **options):
        asked.append(request)
        return ends[request.strategies]

    monkeypatch.setattr("memscope.cli.profile_program.launch", launched)
    monkeypatch.chdir(tmp_path)
    program = ["--", sys.executable, "-c", "pass"]
    words = ["--device", "cpu", "--json", "-s", "lora", "--steps", "all", "-o", "runs", *program]
    with pytest.raises(SystemExit) as ended:
        main(["profile", *words])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert [run["strategies"] for run in json.loads(out)["runs"]] == [[]]
    assert json.loads(out)["program"]["exit_code"] == 3
    assert err == "memscope: error: run lora: refused\n"
    assert [(one.strategies, one.steps, one.device) for one in asked] == [("", None, "cpu"), ("lora", None, "cpu")]
    assert asked[0].folder != asked[1].folder, "each run has its own scratch folder"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["baseline.npz", "report.html"]
