"""Ctrl-C from the entry point on: exit code 130, one line, nothing left behind, wherever it comes."""

import contextlib
import json
import os
import signal
import weakref

import pytest
from commands import TARGET, press, pressed_at, run_apart, run_forked

PROFILE = ["profile", "mine.py", "--device", "gpu", "-s", "ga:steps=2"]
ADVISE = ["advise", "mine.py", "--device", "a100-40gb", "--budget", "1GB"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(TARGET)
    return tmp_path


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("mine.py", "__pycache__"))


EACH_IMPORT = """
import atexit, json, os, signal, tempfile
signal.signal(signal.SIGINT, signal.default_int_handler)
own, ends = os.getpid(), {}

class AtEachImport:
    '''A finder that forks at each import of this process and presses Ctrl-C in the fork.'''

    def find_spec(self, name, path, target=None):
        if os.getpid() != own or ("." in name and not name.startswith("memscope.")) or name in sys.stdlib_module_names:
            return None
        with tempfile.TemporaryFile() as said:
            pid = os.fork()
            if pid == 0:
                os.dup2(said.fileno(), 2)
                os.chdir("/")
                from memscope import interrupts
                interrupts._undoing.clear()  # what the parent has begun is not the fork's to undo
                atexit._clear()
                interrupts._process = os.getpid()
                signal.raise_signal(signal.SIGINT)
                return None
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said.seek(0)
            ends[name] = [code, said.read().decode()]
        return None

import memscope.__main__
sys.meta_path.insert(0, AtEachImport())
atexit.register(lambda: os.getpid() == own and print(json.dumps(ends), file=sys.stderr))
"""


def test_ctrl_c_during_any_import_ends_the_command(folder):
    done = run_apart(folder, EACH_IMPORT, *PROFILE, "--json")
    assert done.code == 0, done.err
    ends = json.loads(done.lines[-1])
    assert {"click", "numpy", "torch", "rich", "memscope.cli.main", "memscope.cli.profile", "plotly"} <= set(ends)
    assert {name: end for name, end in ends.items() if end != [130, "stopped\n"]} == {}


def in_weak_reference():
    """Python drops exceptions of such callbacks."""

    class Object: ...

    referred = Object()
    kept = weakref.ref(referred, lambda _: press())
    del referred
    assert kept() is None


def caught():
    with contextlib.suppress(BaseException):
        press()


def made_another_error():
    try:
        press()
    except BaseException:
        raise RuntimeError("of a library") from None


POINTS = {
    "parsing options": ("profile", "memscope.cli.profile:settings_of", 1, press),
    "the folder exists": ("profile", "memscope.cli.profile:_prepared", 1, press),
    "a worker starts": ("profile", "memscope.runs.processes:_Worker.start", 1, press),
    "the target is checked": ("profile", "memscope.runs.processes:wait", 1, press),
    "traces are on the way": ("profile", "memscope.cli.run_folder:Path.mkdir", 3, press),
    "runs are told their tasks": ("profile", "memscope.runs.processes:_Worker.begin", 3, press),
    "runs report": ("profile", "rich.progress:Progress.update", 2, press),
    "traces are read": ("profile", "memscope.cli.profile:compare", 1, press),
    "in a weak reference": ("profile", "memscope.runs.processes:wait", 2, in_weak_reference),
    "caught by a library": ("profile", "memscope.runs.processes:wait", 2, caught),
    "made another error": ("profile", "memscope.cli.profile:check_plans", 1, made_another_error),
    "advise begins": ("advise", "memscope.cli.advise:check_plans", 1, press),
    "advise builds": ("advise", "memscope.advisor.advise:build_workload", 1, press),
    "advise searches": ("advise", "memscope.advisor.search:Search.run", 1, press),
    "advise waits, and a library catches it": ("advise", "memscope.runs.processes:wait", 3, caught),
    "advise computes, and a library catches it": ("advise", "memscope.advisor.tried:Tried.simulated", 1, caught),
    "the last moment": ("profile", "memscope.command.run:sys.exit", 1, press),
}


@pytest.mark.parametrize(("command", "place", "call", "how"), POINTS.values(), ids=POINTS)
def test_ctrl_c_ends_a_command_at_any_point(command, place, call, how, folder):
    words = PROFILE if command == "profile" else ADVISE
    done = run_forked(folder, pressed_at(place, call, how), *words)
    assert done.code == 130, done
    assert done.lines == ["stopped"]
    if place not in ("memscope.cli.profile:compare", "memscope.command.run:sys.exit"):  # the runs are done
        assert left_in(folder) == []
        assert done.out == ""


def test_an_interrupted_search_shows_its_best_plan_so_far(folder):
    done = run_forked(folder, pressed_at("memscope.advisor.search:Search._is_cheaper", 3), *ADVISE)
    assert (done.code, done.lines) == (130, [])
    assert "interrupted: this is the best plan found so far" in " ".join(done.out.split())


def test_workers_are_gone_and_nothing_is_left_after_ctrl_c(folder):
    prelude = """
        import os, signal
        from memscope.runs import processes
        signal.signal(signal.SIGINT, signal.default_int_handler)
        begin = processes._Worker.begin
        def pressing(worker, index, task, timeout):
            begin(worker, index, task, timeout)
            print(worker.process.pid)
            sys.stdout.flush()
            if index == 1:
                signal.raise_signal(signal.SIGINT)
        processes._Worker.begin = pressing
    """
    done = run_apart(folder, prelude, *PROFILE)
    assert (done.code, done.lines) == (130, ["stopped"])
    assert left_in(folder) == []
    pids = [int(pid) for pid in done.out.split()]
    assert len(pids) == 3, "one for the check, two for the runs"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_command_that_ignores_ctrl_c_from_its_start_still_does(folder):
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pressed_at("memscope.cli.devices:all_devices")()

    assert run_forked(folder, prepare, "devices").code == 0
