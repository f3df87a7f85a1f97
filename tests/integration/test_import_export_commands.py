"""`memscope import` and `memscope export` as a user meets them."""

import json
import os
import pickle
import subprocess
import sys

import pytest
from histories import BASE, MIB, block, segment
from snapshots import dumped, entry, frame, snapshot

from memscope.trace import Trace

FORWARD = (frame("forward", "/m/model.py", 12), frame("_call_impl", "/x/torch/nn/modules/module.py", 1751))
WEIGHTS = (
    frame("convert", "/x/torch/nn/modules/module.py", 1355),
    frame("_apply", "/x/torch/nn/modules/module.py", 900),
)


@pytest.fixture
def taken(tmp_path):
    """A snapshot of 2 MiB of weights and 3 MiB that the forward pass made."""
    here = segment(block(2 * MIB), block(3 * MIB), block(15 * MIB, "inactive"))
    history = [
        entry("segment_alloc", BASE, 20 * MIB),
        entry("alloc", BASE, 2 * MIB, *WEIGHTS),
        entry("alloc", BASE + 2 * MIB, 3 * MIB, *FORWARD),
    ]
    return dumped(snapshot([here], history), tmp_path)


def test_import_shows_what_was_alive_at_the_peak_and_that_it_is_inferred(run, taken, tmp_path):
    code, out, _ = run("import", taken)
    assert code == 0
    for text in (
        "snapshot.pickle on GPU 0: 2 allocations",
        "inferred from stacks",
        "parameter",
        "2.00 MiB",
        "activation",
        "3.00 MiB",
        "peak reserved",
        "20.0 MiB",
        f"Next: memscope report {tmp_path / 'snapshot.npz'}",
    ):
        assert text in out
    trace = Trace.load(tmp_path / "snapshot.npz")
    assert trace.peak.allocated_bytes == 5 * MIB


def test_import_as_json_has_bytes_and_says_what_is_inferred(run, taken, tmp_path):
    code, out, _ = run("import", taken, "-o", "mine.npz", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema_version"] == 1
    assert document["trace"] == "mine.npz"
    assert document["allocations"] == 2
    assert document["peak"] == {"allocated": 5 * MIB, "reserved": 20 * MIB, "phase": "forward", "step": 0}
    assert document["at_peak"]["parameter"] == 2 * MIB
    assert document["inferred"] == ["category", "module", "op", "phase", "step", "micro_batch"]
    assert document["notes"] == []
    assert (tmp_path / "mine.npz").exists()


def test_what_is_not_exact_is_shown(run, tmp_path):
    freed = [entry("free_requested", BASE, 2 * MIB, *FORWARD), entry("free_completed", BASE, 2 * MIB, *FORWARD)]
    _, out, _ = run("import", dumped(snapshot([segment(block(20 * MIB, "inactive"))], freed), tmp_path))
    assert "Not exact: blocks allocated before the history began and freed in it: 1 (2.00 MiB)" in out


def test_running_out_of_memory_is_shown(run, tmp_path):
    history = [entry("alloc", BASE, 2 * MIB, *FORWARD), entry("oom", 5 * MIB, 30 * MIB, *FORWARD)]
    _, out, _ = run(
        "import", dumped(snapshot([segment(block(2 * MIB), block(18 * MIB, "inactive"))], history), tmp_path)
    )
    assert "ran out of memory while allocating 30.0 MiB (20.0 of 25.0 MiB reserved)" in out


def test_one_of_several_gpus_is_chosen(run, tmp_path):
    path = dumped(snapshot([segment(block(MIB)), {**segment(block(2 * MIB)), "device": 1}]), tmp_path)
    code, _, err = run("import", path)
    assert code == 2
    assert "choose one of 0, 1 with --device" in err
    assert run("import", path, "--device", "1")[0] == 0


@pytest.mark.parametrize("to", ["torch-snapshot", "perfetto", "chrome", "csv", "parquet"])
def test_every_export_writes_a_file_and_says_what_to_do_with_it(run, taken, tmp_path, to):
    if to == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    run("import", taken)
    code, out, _ = run("export", "snapshot.npz", "--to", to, "-o", "written")
    assert code == 0
    assert "Opens in: " in out
    assert "written: 2 allocations" in out
    assert "Next: memscope report snapshot.npz" in out
    assert "inferred from stacks: category" in out
    assert (tmp_path / "written").stat().st_size > 0


def test_a_trace_goes_to_pytorch_and_back(run, taken, tmp_path):
    run("import", taken)
    assert run("export", "snapshot.npz", "--to", "torch-snapshot", "-o", "again.pickle")[0] == 0
    assert pickle.loads((tmp_path / "again.pickle").read_bytes())["device_traces"]
    assert run("import", "again.pickle")[0] == 0
    first, second = (Trace.load(tmp_path / name) for name in ("snapshot.npz", "again.npz"))
    assert second.by("category", "module", "op") == first.by("category", "module", "op")
    assert second.meta == first.meta


def test_export_as_json_names_the_file(run, taken):
    run("import", taken)
    code, out, _ = run("export", "snapshot.npz", "--to", "csv", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema_version"] == 1
    assert document["file"] == "snapshot.csv"
    assert document["size_bytes"] == os.path.getsize("snapshot.csv")


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_with_code_is_refused_and_leaves_nothing(run, tmp_path):
    path = dumped(Evil(), tmp_path)
    code, out, err = run("import", path)
    assert code == 2
    assert out == ""
    assert f"refused: the file asks for {os.mkdir.__module__}.mkdir" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [path]


BAD = {
    "no such snapshot": (("import", "nowhere.pickle"), 2, "nowhere.pickle: no such file"),
    "a trace to import": (("import", "trace.npz", "-o", "x.npz"), 2, "zip archive"),
    "a snapshot to export": (("export", "snapshot.pickle", "--to", "csv"), 2, "memscope import snapshot.pickle"),
    "no such trace": (("export", "nowhere.npz", "--to", "csv"), 2, "nowhere.npz: no such file"),
    "unknown format": (("export", "trace.npz", "--to", "json"), 2, "torch-snapshot"),
    "no format": (("export", "trace.npz"), 2, "--to"),
    "a folder that is not there": (
        ("export", "trace.npz", "--to", "csv", "-o", "no/x.csv"),
        2,
        "no/x.csv: there is no folder no",
    ),
    "a file that exists": (("export", "trace.npz", "--to", "csv", "-o", "trace.npz"), 2, "overwrite it with -f"),
    "a trace that exists": (("import", "snapshot.pickle", "-o", "trace.npz"), 2, "overwrite it with -f"),
    "a negative GPU": (("import", "snapshot.pickle", "--device", "-1"), 2, "--device"),
}


@pytest.mark.parametrize(("words", "expected_code", "expected"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_message_and_no_file(run, taken, tmp_path, words, expected_code, expected):
    run("import", taken, "-o", "trace.npz")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run(*words)
    assert code == expected_code
    assert expected in err
    assert "Traceback" not in err
    assert out == ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_existing_files_are_overwritten_when_forced(run, taken):
    assert run("import", taken)[0] == 0
    assert run("import", taken, "-f")[0] == 0
    assert run("export", "snapshot.npz", "--to", "csv")[0] == 0
    assert run("export", "snapshot.npz", "--to", "csv", "-f")[0] == 0


def test_import_needs_no_torch(taken, tmp_path):
    words = [sys.executable, "-X", "importtime", "-m", "memscope", "import", str(taken)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "memscope.exchange.torch_reader" in loaded
    assert not loaded & {"torch", "plotly"}
