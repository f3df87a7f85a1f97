"""Broken targets: one error message, and nothing left behind."""

import signal

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memscope import Workload, simulate
from memscope.errors import TargetError
from memscope.runs.plans import _side_by_side

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
BROKEN = {
    "nothing": ("    workload()", "build returned None, not a Workload: end it with `return Workload("),
    "a model": ("    return workload().model", "build returned a Linear, not a Workload"),
    "no model": ("    return workload(model=None)", 'the model of "mine" is a NoneType: expected an nn.Module'),
    "a generator": ("    return workload(batches=(x for x in [1]))", "are a generator, not a sequence"),
    "an exit": ("    sys.exit('no data')", '"the target" failed: SystemExit: no data (at'),
    "an exit at work": ("    return workload(loss=lambda m, x: sys.exit(3))", '"mine" failed: SystemExit: 3 (at'),
}


@pytest.mark.parametrize(("body", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_target_ends_in_one_message(body, said, run, tmp_path):
    (tmp_path / "mine.py").write_text(HEAD + body)
    code, out, err = run("profile", "mine.py", "--device", "gpu", "-s", "ga:steps=2")
    assert code in (1, 2)
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("mine.py", "__pycache__")] == []


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_real_run_that_fails_leaves_no_traceback_of_the_runs_after_it(run, tmp_path):
    (tmp_path / "mine.py").write_text(HEAD + "    return workload(loss=lambda m, x: 1 / 0)")
    code, _, err = run("profile", "mine.py", "--device", "cpu", "-s", "ga:steps=2", "-s", "amp:dtype=bf16")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err


def test_an_unexpected_error_is_reported_as_one_message(run, tmp_path, monkeypatch):
    monkeypatch.setattr("memscope.cli.profile.find_target", lambda text: 1 / 0)
    code, _, err = run("profile", "llama2")
    assert code == 1
    assert err.startswith("memscope: error: ZeroDivisionError: division by zero\n")
    assert "This is a bug in memscope" in err
    assert "--debug" in err
    assert "Traceback" not in err


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals of this system have no mask")
def test_child_processes_ignore_ctrl_c_from_the_start():
    # Called in a process of a run, as work(index, spec): adds nothing to what is blocked there, and says what is.
    (blocked,) = _side_by_side(signal.pthread_sigmask, [(signal.SIG_BLOCK, ())], lambda *message: None)
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
