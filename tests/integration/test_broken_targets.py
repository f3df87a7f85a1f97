"""Broken targets: one error message, and nothing left behind."""

import itertools
import signal
import time
from multiprocessing.connection import wait
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memscope import Workload, simulate
from memscope.errors import TargetError
from memscope.runs import processes
from memscope.runs.processes import alone

HEAD = """
import dataclasses, sys, torch
from memscope import Workload


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 4


def workload(**changes):
    given = dict(
        model=torch.nn.Linear(4, 4), batches=[torch.ones(2, 4)], loss=lambda m, x: m(x).sum(),
        optimizer_factory=torch.optim.SGD, name="mine",
    )
    return Workload(**{**given, **changes})


def build(config):
"""
FIRST = len(HEAD.splitlines()) + 1
"""The line of `build` in the file: the first of each body below."""

BROKEN = {
    "nothing": ("workload()", "build returned None, not a Workload: end it with `return Workload("),
    "a model": ("return workload().model", "build returned a Linear, not a Workload"),
    "no model": ("return workload(model=None)", 'the model of "mine" is a NoneType: expected an nn.Module'),
    "a generator": ("return workload(batches=(x for x in [1]))", "are a generator, not a sequence"),
    "an exit": (
        "sys.exit('no data')",
        '"the target" failed: SystemExit: no data (at {file}:{line}, in build: sys.exit',
    ),
    "an exit at work": (
        "return workload(loss=lambda m, x: sys.exit(3))",
        '"mine" failed: SystemExit: 3 (at {file}:{line}, in <lambda>: return',
    ),
    "past Exception": ("raise GeneratorExit('x')", '"the target" failed: GeneratorExit: x (at {file}:{line}, in build'),
    "past Exception at work": (
        "return workload(loss=lambda m, x: (_ for _ in ()).throw(BaseException('x')))",
        '"mine" failed: BaseException: x (at {file}:{line}, in <genexpr>',
    ),
    "no memory": ("raise MemoryError", ": the host ran out of memory (at {file}:{line}, in build: raise"),
    "no loss": (
        "return workload(loss=lambda m, x: None)",
        'the loss of "mine" returned None, not a tensor with one element: end it with `return loss`, the mean over the '
        "micro-batch (at {file}:{line}, in <lambda>: return",
    ),
    "a loss a row": (
        "return workload(loss=lambda m, x: m(x))",
        ", 4], not a tensor with one element",  # of the whole batch, or of a micro-batch
    ),
    "a shape as loss": ("return workload(loss=lambda m, x: x.shape)", "returned a Size, not a tensor with one element"),
    "an end": (
        "import os; os._exit(0)",
        "the target ended its process with exit code 0 (at {file}:{line}, in build: import os; os._exit(0)): let it",
    ),
    "an end at work": (
        "import os; return workload(loss=lambda m, x: os._exit(5))",
        "the target ended its process with exit code 5 (at {file}:{line}, in <lambda>: import os",
    ),
    "a crash": (
        "import ctypes; ctypes.string_at(0)",
        "the target's process died of SIGSEGV (at {file}:{line}, in build: import ctypes",
    ),
    "a signal at work": (
        "import signal; return workload(loss=lambda m, x: signal.raise_signal(signal.SIGTERM))",
        "the target's process died of SIGTERM (at {file}:{line}, in <lambda>: import signal",
    ),
    "killed": (
        "import signal; signal.raise_signal(signal.SIGKILL)",
        "the target's process was killed (SIGKILL), probably because the host ran out of memory: close other",
    ),
}


@pytest.mark.parametrize(("body", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_target_ends_in_one_message_that_names_its_line(body, said, run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}    {body}\n")
    code, out, err = run("profile", "mine.py", "--device", "gpu", "-s", "ga:steps=2")
    assert code in (1, 2)
    assert err.lstrip().startswith("memscope: error: ")
    assert said.format(file=file, line=FIRST) in err
    assert "Traceback" not in err
    assert out == ""
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("mine.py", "__pycache__")] == []


@pytest.fixture
def hours_pass(monkeypatch):
    """An hour passes at each look at the clock by the parent of worker processes once a file exists; no time before."""

    def once(file):
        hours = itertools.count(1)
        clock = SimpleNamespace(monotonic=lambda: 3600 * next(hours) if file.exists() else 0, sleep=time.sleep)
        monkeypatch.setattr(processes, "time", clock)
        monkeypatch.setattr(processes, "wait", lambda objects, timeout: wait(objects, 0.05))
        return file

    return once


@pytest.mark.parametrize(
    "body",
    [
        "open('hangs', 'w').close(); import time; time.sleep(1e6)",
        "return workload(loss=lambda m, x: [open('hangs', 'w').close() for _ in iter(int, 1)])",
    ],
    ids=["in build, in C", "at work, in Python"],
)
def test_a_target_that_hangs_is_ended_after_the_timeout_and_its_line_is_named(body, run, tmp_path, hours_pass):
    hours_pass(tmp_path / "hangs")
    (tmp_path / "mine.py").write_text(f"{HEAD}    {body}\n")
    code, out, err = run("profile", "mine.py", "--device", "gpu", "--timeout", "90min")
    assert (code, out) == (1, "")
    assert f"the target took longer than 5,400 s (at {tmp_path / 'mine.py'}:{FIRST}, in " in err
    assert err.endswith(f": {body}): raise --timeout, or choose smaller settings\n")


def test_a_time_without_its_unit_is_refused(run):
    for text in ("90", "0s", "-1s", "9 weeks", "1e9h", "99999999h"):
        code, _, err = run("profile", "llama2", "--timeout", text)
        assert code == 2
        assert f'"{text}" is not a time: expected a positive number with ms, s, min or h, for example 90s' in err


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_real_run_that_fails_leaves_no_traceback_of_the_runs_after_it(run, tmp_path):
    (tmp_path / "mine.py").write_text(HEAD + "    return workload(loss=lambda m, x: 1 / 0)")
    code, _, err = run("profile", "mine.py", "--device", "cpu", "-s", "ga:steps=2", "-s", "amp:dtype=bf16")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err


def test_an_unexpected_error_is_reported_as_one_message(run, tmp_path, monkeypatch):
    monkeypatch.setattr("memscope.cli.profile.check_plans", lambda *asked, **options: 1 / 0)
    code, _, err = run("profile", "llama2")
    assert code == 1
    assert err.startswith("memscope: error: ZeroDivisionError: division by zero\n")
    assert "This is a bug in memscope" in err
    assert "--debug" in err
    assert "Traceback" not in err


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals of this system have no mask")
def test_child_processes_ignore_ctrl_c_from_the_start():
    blocked = alone(signal.pthread_sigmask, signal.SIG_BLOCK, ())  # adds nothing to what is blocked there
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class _Failing(torch.nn.Linear):
    """A layer that fails inside a checkpoint of its own if `fails` is set."""

    fails = True

    def forward(self, x):
        return checkpoint(self._inner, x, use_reentrant=False)

    def _inner(self, x):
        if self.fails:
            raise ValueError("of the target's own")
        return super().forward(x)


def test_a_target_that_fails_inside_a_checkpoint_leaves_the_next_run_alone():
    """PyTorch up to 2.11 leaves the hooks of the region active as long as the error is referenced."""

    def failing():
        data = torch.ones(2, 4, requires_grad=True)
        return Workload(_Failing(4, 4), [data], lambda m, x: m(x).sum(), torch.optim.SGD, name="mine")

    def working():
        built = failing()
        built.model.fails = False
        return built

    with pytest.raises(TargetError, match="of the target's own") as kept:
        simulate(failing, device="gpu")
    assert simulate(working, device="gpu").peak.allocated_bytes > 0
    del kept
