"""`memscope profile -- COMMAND`: unchanged programs are started, recorded on the CPU, stopped, and their ends told."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from memscope.cli.main import main
from memscope.runs.would_free import Remedies
from memscope.trace import Trace

PROGRAMS = Path(__file__).parents[1] / "programs"


@dataclass(frozen=True)
class Told:
    """What a command has left."""

    code: int
    document: dict
    out: str
    err: str


@pytest.fixture
def profile(tmp_path, monkeypatch, capfd):
    """`memscope profile --device cpu … -- COMMAND` in a folder of its own, with this Python first on PATH."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.chdir(tmp_path)

    def run(*words, options=("--json",)):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
            main(["profile", "--device", "cpu", "-o", "runs", *options, "--", *words])
        document = json.loads(out.getvalue()) if "--json" in options and out.getvalue() else {}
        return Told(end.value.code or 0, document, out.getvalue(), capfd.readouterr().err)

    return run


def test_a_module_with_arguments_and_relative_imports_stops_after_two_steps(profile):
    told = profile("python", "-m", "plain.train", "--width", "8")
    assert told.code == 0
    assert told.document["target"] == "plain.train"
    assert told.document["program"] == {"command": ["python", "-m", "plain.train", "--width", "8"], "exit_code": 0}
    assert told.document["device"] == {"name": "cpu", "simulated": False}
    (run,) = told.document["runs"]
    parameters = 8 * 16 + 16 + 16 + 1
    assert run["parameters"] == {"total": parameters, "trainable": parameters}
    assert run["at_peak"]["parameter"] == 4 * parameters
    assert run["assumptions"] == run["notes"] == []
    trace = Trace.load(run["trace"])
    assert trace.steps == (0, 1)
    assert trace.meta["program"] == told.document["program"]
    printed = [line.split()[:2] for line in told.err.splitlines()]
    assert [line for line in printed if line[0] == "step"] == [["step", "0"], ["step", "1"]]
    assert "Traceback" not in told.err


def test_an_awkward_program_behaves_as_without_memscope(tmp_path):
    words = ["profile", "--device", "cpu", "--steps", "all", "--json", "-o", "runs"]
    command = [sys.executable, "-m", "memscope", *words, "--", sys.executable, str(PROGRAMS / "awkward.py")]
    done = subprocess.run(command, cwd=tmp_path, input="8\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["child says 42", "fork ended with 5", "signals 3"]
    document = json.loads(done.stdout)
    assert document["program"]["exit_code"] == 0
    (run,) = document["runs"]
    (note,) = run["notes"]
    assert note.startswith("Another process of the program trains as well and was not followed: process ")
    assert "(a fork, of " in note
    assert Trace.load(tmp_path / run["trace"]).steps == (0, 1, 2)


def test_a_program_that_catches_the_stop_is_ended_and_its_output_kept_apart(profile, tmp_path):
    told = profile("python", str(PROGRAMS / "swallows.py"), options=("--json", "--quiet", "--steps", "1"))
    assert told.code == 0
    assert told.err == ""
    assert (tmp_path / "runs/baseline.log").read_text().splitlines() == ["caught Enough"] * 3
    assert Trace.load(told.document["runs"][0]["trace"]).steps == (0,)


def test_an_installed_script_that_fails_after_a_step_has_results_with_a_note(profile, tmp_path):
    script = tmp_path / "train-it"
    source = (PROGRAMS / "plain/train.py").read_text().replace("from .model", "from plain.model")
    script.write_text(f"#!{sys.executable}\n" + source.replace('    print("step"', '    1 / 0, print("step"'))
    script.chmod(0o755)
    told = profile(str(script), options=())
    assert told.code == 0
    assert "train-it on cpu (measured)" in told.out
    note = "The program failed after 1 optimizer step (exit code 1): ZeroDivisionError: division by zero"
    assert note in " ".join(told.out.split())
    assert Trace.load(tmp_path / "runs/baseline.npz").meta["program"]["exit_code"] == 1


def test_the_process_that_torchrun_starts_is_the_one_that_is_recorded(profile):
    words = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "1", str(PROGRAMS / "swallows.py")]
    told = profile("python", "-m", "torch.distributed.run", *words)
    assert told.code == 0, told.err
    assert told.document["target"] == "swallows.py"
    assert told.document["runs"][0]["notes"] == []


def test_a_program_that_fails_before_its_first_step_is_shown_with_its_exit_code(profile, tmp_path):
    (tmp_path / "broken.py").write_text("import torch\nraise ValueError('no data')\n")
    told = profile("python", "broken.py")
    assert told.code == 1
    assert told.document["program"] == {"command": ["python", "broken.py"], "exit_code": 1}
    assert "ValueError: no data" in told.err
    assert "Traceback (most recent call last)" in told.err
    assert told.err.splitlines()[-1] == (
        "memscope: error: broken.py failed before its first optimizer step ended (exit code 1)"
    )
    assert told.document["error"]["message"] in told.err


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("print('done')", (), "ended without an optimizer step: it did not train. Expected: the call of an nn.Module"),
        ("import sys; print('wrong'); sys.exit(3)", ("--quiet",), "(exit code 3)\nIts output (runs/baseline.log) ends"),
        ("import time; time.sleep(600)", ("--timeout", "300ms"), "the program took no optimizer step within 300 ms"),
        ("import os; os.kill(os.getpid(), 9)", (), "failed before its first optimizer step ended (SIGKILL)"),
    ],
    ids=["ends", "quiet", "never steps", "is killed"],
)
def test_a_program_without_a_step_is_an_error_that_says_what_was_expected(profile, tmp_path, source, options, message):
    (tmp_path / "train.py").write_text(source)
    told = profile("python", "train.py", options=options)
    assert told.code == 1
    assert message in told.err
    assert "Traceback" not in told.err


def test_a_program_that_runs_out_of_memory_before_it_trains_is_told_how_to_learn_what_it_needs(profile, tmp_path):
    (tmp_path / "train.py").write_text("import torch; raise torch.OutOfMemoryError('CUDA out of memory')")
    told = profile("python", "train.py")
    assert told.code == 4
    assert told.document["error"]["kind"] == "OutOfDeviceMemory"
    assert "OutOfMemoryError: CUDA out of memory" in told.err, "the program's own traceback"
    assert "before it trained: a GPU is recorded from the first call of a model on" in told.err.splitlines()[-1]


SLEEPS = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"


def test_ctrl_c_ends_the_program_with_one_line(tmp_path):
    command = [sys.executable, "-m", "memscope", "profile", "--device", "cpu", "--", sys.executable, "-c", SLEEPS]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as memscope:
        pid = int(memscope.stderr.readline().split()[1])
        memscope.send_signal(signal.SIGINT)
        assert memscope.stderr.read() == "stopped\n"
    assert memscope.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_program_reads_from_the_terminal(tmp_path):
    source = "print('got', input('which? '))"
    options = ["--device", "cpu", "--timeout", "60s"]  # a program that waits in vain would wait forever
    command = [sys.executable, "-m", "memscope", "profile", *options, "--", sys.executable, "-c", source]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execv(command[0], command)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal without processes
        while chunk := os.read(terminal, 1000):
            shown += chunk
            if shown.endswith(b"which? "):
                os.write(terminal, b"this\n")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    assert b"got this" in shown


def test_a_program_that_does_not_fit_is_explained_with_what_was_alive_what_grows_and_what_inference_keeps(
    profile, monkeypatch
):
    offered = []

    def would_help(program, request, end, moved, **more):  # each strategy would be another run of the program
        offered.extend(offer.spec for offer in end.offers.strategies)
        return Remedies()

    monkeypatch.setattr("memscope.cli.profile_program.would_help", would_help)
    options = ("--json", "--steps", "all", "--device", "a100-40gb:541MiB")  # 501 MiB of them are the CUDA context
    told = profile("python", str(PROGRAMS / "keeps.py"), options=options)
    assert told.code == 4, told.err
    assert {"ckpt", "lora"} <= set(offered)
    (run,) = told.document["runs"]
    assert run["models"] == {"(model)": "Teacher", "Decoder": "Decoder"}
    batch, width, prompt, new, layers = 64, 256, 16, 8, 2
    assert run["growing"] == [
        {
            "category": "activation",
            "module": "Decoder",  # no module runs in the loop itself: the model that was called last
            "op": "aten.pow.Tensor_Scalar",
            "steps": [0, 1, 2, 3, 4],
            "bytes": 5 * batch * prompt * width * 4,
        }
    ]
    phases = {one["phase"]: one for one in run["phases"]}
    assert list(phases) == ["setup", "forward", "loss", "backward", "optimizer", "outside", "inference"]
    # The last call has the cache of the calls before it, the prompt and all new tokens but its own, and their output.
    tokens = 2 * layers * (prompt + new - 1) + 1
    kept = phases["inference"]["kept_by_module"]["Decoder.layers.*"]
    unsplit = 2 * layers * 2**20  # a block may be larger than requested by up to 1 MiB
    assert tokens * batch * width * 4 <= kept < tokens * batch * width * 4 + unsplit
    oom, held = run["out_of_memory"], run["alive_when_out_of_memory"]
    assert oom["reserved"] <= oom["limit"] < run["peak"]["reserved"]
    assert sum(one["bytes"] for one in held) == sum(oom["by_category"].values())
    assert held[0]["bytes"] == max(one["bytes"] for one in held)
