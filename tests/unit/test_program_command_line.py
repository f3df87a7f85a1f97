"""The command line of a program: what memscope takes of it, what it finds wrong before anything runs."""

import json
import os
import sys
from pathlib import Path

import pytest

from memscope import __version__
from memscope.cli.main import main
from memscope.command.program_words import split_program
from memscope.errors import MemscopeError, TraceFileError, UsageError
from memscope.program.command_line import resolve_program
from memscope.program.environment import environment_of
from memscope.program.request import Failure, ProgramOutcome, Request
from memscope.program.scratch import Scratch

REQUEST = Request(
    device="a100-80gb",
    simulated=True,
    device_file="/etc/devices.toml",
    allocator="expandable_segments:True",
    assume="experts=worst",
    steps=None,
    strategies="lora:r=8,ckpt",
    folder="/tmp/scratch",
    command=("python", "träin.py", "--lr", "1e-4"),
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with `bin`, the only folder on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def command(folder: Path, name: str, text: str) -> Path:
    """A command on PATH."""
    path = folder / "bin" / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def python_with(folder: Path, name: str = "python", **packages: bool) -> Path:
    """A Python that has some packages, as it answers when it is asked."""
    answer = json.dumps({"torch": True, "memscope": True} | packages)
    return command(folder, name, f"#!/bin/sh\necho 'a message of the site'\necho '{answer}'\n")


@pytest.mark.parametrize(
    ("words", "own", "program"),
    [
        (["llama2", "--steps", "3"], ["llama2", "--steps", "3"], None),
        (["--json", "--", "python", "train.py", "--", "x"], ["--json"], ("python", "train.py", "--", "x")),
        (["--"], [], ()),
    ],
)
def test_the_first_two_dashes_begin_the_program(words, own, program):
    assert split_program(words) == (own, program)


def test_a_request_and_an_outcome_are_what_was_written(tmp_path):
    REQUEST.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == REQUEST
    assert json.loads((tmp_path / "request.json").read_text())["version"] == __version__
    outcome = ProgramOutcome("failed", 1, "trace.npz", Failure.of(UsageError("wrong"), "Traceback"), "no", ("a note",))
    outcome.write(tmp_path / "outcome.json")
    assert ProgramOutcome.read(tmp_path / "outcome.json") == outcome


@pytest.mark.parametrize("text", [None, "{", '{"device": 1}'])
def test_a_request_that_cannot_be_read_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "request.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MemscopeError, match=r"request\.json: cannot be read as Request"):
        Request.read(path)


def test_a_failure_keeps_the_kind_of_an_error_and_its_exit_code():
    class Special(TraceFileError):
        """A kind that another module defines."""

    assert Failure.of(Special("gone")) == Failure("TraceFileError", "gone", 2)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["python", "code/train.py", "--lr", "1"], "train.py"),
        (["python", "-Xdev", "-W", "error", "-uB", "--check-hash-based-pycs", "never", "code/train.py"], "train.py"),
        (["python", "-P", "-mpkg.train", "code/train.py"], "pkg.train"),
        (["python", "-m", "torch.distributed.run", "--nproc-per-node", "1", "code/train.py"], "train.py"),
        (["python", "-c", "import train", "-m", "x"], "python"),
        (["python", "-"], "python"),
        (["torchrun", "--standalone", "code/train.py"], "train.py"),
        (["train-it", "config.yaml"], "train-it"),
    ],
)
def test_a_program_has_the_name_of_its_script(here, words, name):
    python_with(here, **{"pkg.train": True, "torch.distributed.run": True})
    for one in ("torchrun", "train-it"):
        command(here, one, "#!/usr/bin/env python\n")
    (here / "code").mkdir()
    (here / "code/train.py").touch()
    program = resolve_program(words)
    assert (program.name, program.words) == (name, tuple(words))
    assert program.path == str(here / "bin" / words[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no program after --: expected a command, for example memscope profile -- python train.py"),
        (["trian"], 'there is no command "trian" on PATH: expected the program to start'),
        (["train.py"], "start it as memscope profile -- python train.py"),
        (["./train.py", "--lr", "1"], '"./train.py" is not executable: start it as memscope profile -- python ./train'),
        (["gone.py"], 'there is no command "gone.py": start a script with its Python: memscope profile -- python gone'),
        (["python", "trian.py"], 'did you mean "train.py"? Valid: train.py'),
        (["python", "src/train.py"], 'there is no file "src/train.py": the folder src does not exist'),
        (
            ["python", "-E", "train.py"],
            "python -E ignores PYTHONPATH, by which memscope attaches to the program: leave",
        ),
        (["python", "-uI", "train.py"], "python -I ignores PYTHONPATH"),
        (["python", "-S", "train.py"], "python -S imports no sitecustomize"),
        (["python", "-m", "missing"], 'has no module "missing" (python -m missing): check its name'),
        (["python3", "train.py"], "bin/python3 has no PyTorch: choose the Python of your training environment"),
        (["python3.12", "train.py"], f"bin/python3.12 -m pip install torch-memscope=={__version__}"),
        (["console"], "bin/python3 has no PyTorch"),
        (["python3.13", "train.py"], "bin/python3.13 does not work: no such option"),
    ],
)
def test_what_cannot_be_started_is_one_error_that_names_it(here, words, message):
    python_with(here, missing=False)
    python_with(here, "python3", torch=False)
    python_with(here, "python3.12", memscope=False)
    command(here, "python3.13", "#!/bin/sh\necho 'no such option' >&2; exit 2\n")
    command(here, "console", f"#!{here}/bin/python3 -s\nfrom pkg import main\n")
    (here / "train.py").touch()
    with pytest.raises(UsageError) as error:
        resolve_program(words)
    assert message in str(error.value)


def test_modules_are_looked_for_without_importing_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "pkg/train.py").touch()
    assert resolve_program([sys.executable, "-m", "pkg.train"]).name == "pkg.train"
    with pytest.raises(UsageError, match=r'has no module "pkg\.trian"'):
        resolve_program([sys.executable, "-m", "pkg.trian"])


PROGRAM = ["--", sys.executable, "-c", "pass"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama2", *PROGRAM], '"llama2" stands before --: profile takes a target or a program, not both'),
        (["--preset", "debug", *PROGRAM], "--preset is for targets: leave it out where a program follows --"),
        (["--set", "a=1", *PROGRAM], "--set is for targets"),
        (["--grid", "lora,amp", *PROGRAM], "--grid is for targets"),
        (["--vary", "n_layers=1/2", *PROGRAM], "--vary is for targets"),
        (["--live", *PROGRAM], "--live is for targets"),
        (["--trust-remote-code", *PROGRAM], "--trust-remote-code is for targets"),
        (["-s", "ckpt:auto,budget=1GB", *PROGRAM], "ckpt:auto searches for a target's checkpoint plan"),
        (["--device", "cpu", "--assume", "refuse", *PROGRAM], "--assume is for simulations"),
        (["--device", "a100", *PROGRAM], 'there is no device "a100": did you mean'),
        (["--steps", "none", *PROGRAM], "--steps"),
        (["llama2", "--steps", "all"], "--steps all is for programs"),
        (["llama2", "--quiet"], "--quiet is for programs"),
        ([], "profile what? Name a target (see: memscope targets), or a program after --"),
        (["--"], "no program after --"),
        (["--", "no-such-command", "--debug"], 'there is no command "no-such-command"'),
    ],
)
def test_options_that_do_not_belong_together_are_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["profile", *words])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_simulated_program_has_its_services_switched_off_and_a_recorded_one_not():
    inherited = {"PYTHONPATH": "mine", "WANDB_MODE": "online", "HOME": "/home/me"}
    simulated = environment_of(REQUEST, inherited)
    first, second = simulated["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "sitecustomize.py").is_file()
    assert second == "mine"
    assert simulated["MEMSCOPE_PROGRAM"] == str(Scratch(Path(REQUEST.folder)).request)
    assert (simulated["WANDB_MODE"], simulated["HF_HUB_DISABLE_TELEMETRY"]) == ("disabled", "1")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in simulated, "the simulation reads it from the request"
    recorded = environment_of(Request(**{**vars(REQUEST), "device": "cuda", "simulated": False}), inherited)
    assert (recorded["WANDB_MODE"], recorded["HOME"]) == ("online", "/home/me")
    assert recorded["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
