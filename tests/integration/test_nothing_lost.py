"""Results that were worked out are shown and kept: when a write fails, when a run is lost, when the target prints."""

import json
import os
import resource

import pytest
from commands import TARGET, run_apart

from memscope.cli import grid, profile
from memscope.errors import TraceFileError
from memscope.exchange.torch_writer import torch_snapshot_bytes
from memscope.trace import Trace

PROFILE = ["profile", "mine.py", "--device", "gpu", "-o", "runs"]
FULL = "No space left on device"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(TARGET)
    return tmp_path


def full(path, *_, **__):
    raise TraceFileError(f"{path}: cannot be written ({FULL})")


@pytest.fixture
def small_files():
    """Files can hold 64 KiB: traces fit, pages do not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kept(folder):
    return sorted(path.name for path in (folder / "runs").iterdir())


def test_a_page_that_cannot_be_written_costs_no_table_and_no_trace(run, folder, small_files):
    code, out, err = run(*PROFILE, "-s", "ga:steps=2")
    assert code == 2
    assert err.strip().splitlines() == ["memscope: error: runs/report.html: cannot be written (File too large)"]
    for text in ("Table 1", "Traces: runs", "Next: memscope diff"):
        assert text in out
    assert "Page:" not in out
    assert kept(folder) == ["baseline.npz", "ga_steps=2.npz"]


def test_json_is_whole_when_the_page_cannot_be_written(run, folder, small_files):
    code, out, err = run(*PROFILE, "--json")
    assert code == 2
    assert "report.html: cannot be written (File too large)" in err
    assert len(json.loads(out)["runs"]) == 1


def test_the_grid_is_printed_when_neither_page_nor_table_can_be_written(run, folder, monkeypatch):
    monkeypatch.setattr(grid, "write_page", lambda runs, table, baselines, path, more: full(path))
    monkeypatch.setattr(grid, "write_whole", full)
    code, out, err = run(*PROFILE, "--grid", "ga:steps=2", "--table", "t.csv")
    assert code == 2
    assert err.strip().splitlines() == [
        f"memscope: error: runs/report.html: cannot be written ({FULL})",
        f"t.csv: cannot be written ({FULL})",
    ]
    assert "Table 2" in out
    assert kept(folder) == ["baseline.npz", "ga_steps=2.npz"]


def test_traces_that_cannot_be_written_cost_no_table(run, folder, monkeypatch):
    carry_out = profile.run_all

    def without_room(specs, report):
        specs[0].path.parent.rmdir()  # the workers cannot write either
        return carry_out(specs, report)

    monkeypatch.setattr(profile, "run_all", without_room)
    monkeypatch.setattr(Trace, "save", lambda self, path, overwrite=False: full(path))
    code, out, err = run(*PROFILE, "-s", "ga:steps=2")
    assert code == 2
    assert f"runs/baseline.npz: cannot be written ({FULL})\nruns/ga_steps=2.npz: cannot be written" in err
    assert "Table 1" in out
    assert kept(folder) == ["report.html"]


def test_advice_is_printed_when_its_files_cannot_be_written(run, folder, monkeypatch):
    monkeypatch.setattr("memscope.strategies.ckpt.layer_plan.write_whole", full)
    monkeypatch.setattr("memscope.dashboards.html.write_whole", full)
    (folder / "mine.py").write_text(TARGET.replace("ones(2, 4)", "ones(2**20, 4)"))
    words = ["--device", "a100-40gb", "--budget", "626MiB", "-s", "ga:steps=1,optim", "-o", "plan.json"]
    code, out, err = run("advise", "mine.py", *words, "--html", "plan.html")
    assert code == 2, out
    assert f"memscope: error: plan.json: cannot be written ({FULL})\nplan.html: cannot be written ({FULL})" in err
    assert "step time (estimate)" in out
    assert "Next:" not in out, "without the plan's file, the next command would not work"
    assert "Page:" not in out


def test_an_imported_snapshot_is_shown_when_its_trace_cannot_be_written(run, folder, monkeypatch):
    code, _, err = run(*PROFILE)
    assert code == 0, err
    (folder / "taken.pickle").write_bytes(torch_snapshot_bytes(Trace.load(folder / "runs" / "baseline.npz")))
    monkeypatch.setattr(Trace, "save", lambda self, path, overwrite=False: full(path))
    code, out, err = run("import", "taken.pickle")
    assert code == 2
    assert f"memscope: error: taken.npz: cannot be written ({FULL})" in err
    assert "Allocated at the peak" in out


def test_a_full_disk_behind_stdout_is_one_error(folder):
    done = run_apart(folder, "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", "devices")
    assert done.code == 2
    assert done.lines == [f"memscope: error: the output: {FULL}"]


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    prelude = """
        import os
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    """
    done = run_apart(folder, prelude, "devices")
    assert done.lines == []


def test_a_folder_that_is_not_writable_is_refused_before_anything_runs(run, folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != "runs" or not mode & os.W_OK)  # also for root
    (folder / "runs").mkdir()
    monkeypatch.setattr(profile, "check_plans", lambda *_, **__: pytest.fail("it ran"))
    code, out, err = run(*PROFILE)
    assert (code, out) == (2, "")
    assert "runs: the folder is not writable: choose another one with -o" in err
    code, out, err = run("advise", "mine.py", "--budget", "1GB", "-o", "runs/plan.json")
    assert (code, out) == (2, "")
    assert "runs/plan.json: the folder runs is not writable: choose another file with -o" in err


LOST_WITH_GA = TARGET.replace(
    "loss=lambda m, x: m(x).square().mean()",
    "loss=lambda m, x: __import__('os')._exit(7) if len(x) == 1 else m(x).mean()",
)


def test_a_run_that_is_lost_costs_no_other(run, folder):
    (folder / "mine.py").write_text(LOST_WITH_GA)
    code, out, err = run(*PROFILE, "-s", "ga:steps=2", "-s", "amp", "--json")
    assert code == 1
    assert "memscope: error: run ga:steps=2: the target ended its process with exit code 7 (at " in err
    assert [one["strategies"] for one in json.loads(out)["runs"]] == [[], ["amp"]]
    assert kept(folder) == ["amp.npz", "baseline.npz", "report.html"]


def test_without_the_baseline_there_is_no_table_but_the_traces_of_the_others_are_kept(run, folder):
    (folder / "mine.py").write_text(LOST_WITH_GA.replace("len(x) == 1", "len(x) == 2"))
    code, out, err = run(*PROFILE, "-s", "ga:steps=2")
    assert (code, out) == (1, "")
    assert err.strip().splitlines()[1] == "the traces of the other runs are in runs: ga_steps=2.npz"
    assert kept(folder) == ["ga_steps=2.npz"]


@pytest.mark.parametrize(
    ("device", "fault", "said"),
    [
        ("gpu", "__import__('os')._exit(7)", "the target ended its process with exit code 7 (at "),
        ("gpu", "bytearray(2**62)", "the host ran out of memory (at "),
        ("cpu", "torch.empty(2**50)", "the host ran out of memory (at "),
    ],
    ids=["ended", "memory", "tensor"],
)
def test_a_grid_with_a_lost_run_shows_the_others_and_marks_it(device, fault, said, run, folder):
    (folder / "mine.py").write_text(LOST_WITH_GA.replace("__import__('os')._exit(7)", fault))
    words = ["profile", "mine.py", "--device", device, "-o", "runs"]
    code, out, err = run(*words, "--grid", "ga:steps=2,optim:fused", "--table", "t.csv")
    assert code == 1
    assert f"memscope: error: run ga:steps=2: {said}" in err
    assert sum(line.count("?") == 3 for line in out.splitlines()) == 2
    assert f"?: the run with ga:steps=2, optim:fused failed: {said}" in " ".join(out.split())
    assert [line.split(",")[2] for line in (folder / "t.csv").read_text().splitlines()[1:]] == ["1", "1", "", ""]
    assert kept(folder) == ["baseline.npz", "optim_fused.npz", "report.html"]


def test_a_grid_without_any_result_is_an_error(run, folder):
    (folder / "mine.py").write_text(LOST_WITH_GA.replace("if len(x) == 1", "if len(x)"))
    code, out, err = run(*PROFILE, "--grid", "ga:steps=2")
    assert (code, out) == (1, "")
    assert [line.partition(": the target")[0] for line in err.strip().splitlines()] == [
        "memscope: error: run baseline", "run ga:steps=2",
    ]  # fmt: skip
    assert not (folder / "runs").exists()


PRINTS = """
import ctypes, os, subprocess, sys


def say(where):
    print(f"python in {where}")
    os.write(1, f"descriptor in {where}\\n".encode())
    subprocess.run(["echo", f"child in {where}"], check=True)
    ctypes.CDLL(None).puts(f"C in {where}".encode())
    ctypes.CDLL(None).fflush(None)


say("module")
"""


@pytest.mark.parametrize(
    "words",
    [[*PROFILE, "--json"], ["advise", "mine.py", "-s", "optim:fused", "--budget", "1GB", "--json"]],
    ids=["profile", "advise"],
)
def test_a_target_that_prints_does_not_break_json(folder, words):
    printing = PRINTS + TARGET.replace("    layers =", "    say('build')\n    layers =")
    (folder / "mine.py").write_text(printing.replace("lambda m, x: m(x)", "lambda m, x: say('loss') or m(x)"))
    done = run_apart(folder, "", *words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["schema_version"] == 1
    for who in ("python", "descriptor", "child", "C"):
        for where in ("module", "build", "loss"):
            assert f"{who} in {where}\n" in done.err
