"""`memscope profile` as a user meets it: what it prints and writes, and what it says when something is wrong."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from skill import lacking

from memscope.cli import profile, run_folder
from memscope.cli.main import main
from memscope.command.target_words import RUNS
from memscope.trace import CATEGORIES, Trace
from memscope.units import format_seconds

DEBUG = ["llama2", "--device", "gpu", "--preset", "debug", "--set", "n_layers=2", "accumulation=2", "seq_len=32"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The JSON document of a baseline, two strategies and both together, and the folder it wrote."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("profile") / "runs"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main(["profile", *DEBUG, "-s", "lora,amp", "-o", str(folder), "--json"])
    assert not end.value.code
    return json.loads(out.getvalue()), folder


def test_the_document_has_the_published_shape(profiled):
    document, folder = profiled
    assert lacking(document, "profile") == []
    assert document["schema_version"] == 1
    assert document["target"] == "llama2"
    assert document["device"] == {"name": "gpu", "simulated": True}
    assert [run["strategies"] for run in document["runs"]] == [[], ["lora"], ["amp"], ["lora", "amp"]]
    wq_and_wv = {"lora": {"targets": "wq+wv"}}
    assert [run["chosen"] for run in document["runs"]] == [{}, wq_and_wv, {}, wq_and_wv]
    for run in document["runs"]:
        assert set(run) == {
            "strategies",
            "chosen",
            "parameters",
            "peak",
            "at_peak",
            "max_by_category",
            "flops",
            "seconds",
            "estimated_seconds",
            "notes",
            "assumptions",
            "trace",
            "out_of_memory",
            "fit",
            "would_free",
            "models",
            "phases",
            "steps",
            "growing",
            "allocator_settings",
            "alive_when_out_of_memory",
        }
        assert run["growing"] == run["allocator_settings"] == run["alive_when_out_of_memory"] == []
        assert set(run["at_peak"]) == set(run["max_by_category"]) == set(CATEGORIES)
        assert sum(run["at_peak"].values()) == run["peak"]["allocated"]
        assert run["assumptions"] == []
        assert run["seconds"] is run["estimated_seconds"] is None, "nothing ran, and the device gpu has no rates"
        assert Path(run["trace"]).parent == folder
    assert set(document["table1"]) == {"lora", "amp", "lora,amp"}
    assert set(document["table1"]["lora"]) == {"parameter", "activation", "gradient", "optimizer_state", "computation"}


def test_arrows_follow_from_the_bytes_beside_them(profiled):
    document, _ = profiled
    for label, rows in document["table1"].items():
        for row, arrow in rows.items():
            effect = document["effects"][label][row]
            change = effect["after"] - effect["before"]
            beyond = abs(change) > 0.01 * effect["before"] and (row == "computation" or abs(change) > 2**20)
            assert arrow == ("–" if not beyond else "↑" if change > 0 else "↓"), (label, row)


def test_every_run_leaves_its_trace_and_all_share_one_page(profiled):
    document, folder = profiled
    assert sorted(p.name for p in folder.iterdir()) == [
        "amp.npz",
        "baseline.npz",
        "lora+amp.npz",
        "lora.npz",
        "report.html",
    ]
    for run in document["runs"]:
        trace = Trace.load(run["trace"])
        assert trace.peak.allocated_bytes == run["peak"]["allocated"]
        assert trace.meta["strategies"] == run["strategies"]
    assert "<html" in (folder / "report.html").read_text()


def test_existing_files_are_kept_unless_forced(profiled, run):
    _, folder = profiled
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, _, err = run("profile", *DEBUG, "-s", "lora,amp", "-o", folder)
    assert code == 2
    assert "exists already" in err
    assert "-f" in err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_tables_name_the_peak_the_arrows_and_what_they_rest_on(run, tmp_path):
    code, out, _ = run("profile", *DEBUG, "-s", "ga:steps=2", "-o", "out")
    assert code == 0
    for text in (
        "Allocated at the peak",
        "Table 1",
        "ga:steps=2",
        "↓",
        "compared with step 1",
        "of the baseline",
        "Baseline: The same effective batch in one micro-batch (ga)",
        "Next:",
    ):
        assert text in " ".join(out.split())
    assert (tmp_path / "out" / "report.html").exists()


def test_accumulation_is_compared_with_the_same_effective_batch_in_one_go(run):
    code, out, _ = run("profile", *DEBUG, "-s", "ga:steps=2", "--json")
    effect = json.loads(out)["effects"]["ga:steps=2"]
    assert code == 0
    # Two samples of 32 tokens at once, against one after the other: half the activations.
    assert effect["activation"]["after"] == pytest.approx(effect["activation"]["before"] / 2, rel=0.02)
    assert effect["computation"]["after"] == effect["computation"]["before"]


def test_plans_given_one_by_one_are_compared_as_they_are(run):
    code, out, _ = run("profile", *DEBUG, "-s", "ckpt", "-s", "ckpt:layers=0,amp:dtype=bf16", "--json")
    assert code == 0
    assert list(json.loads(out)["table1"]) == ["ckpt", "ckpt:layers=0,amp:dtype=bf16"]


def test_a_real_run_on_the_cpu_has_seconds(run):
    code, out, _ = run("profile", *DEBUG, "--device", "cpu", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["device"] == {"name": "cpu", "simulated": False}
    assert document["runs"][0]["seconds"] > 0
    assert document["runs"][0]["estimated_seconds"] is None


def test_a_run_simulated_on_a_certain_gpu_has_an_estimate_by_phase(run):
    code, out, _ = run("profile", *DEBUG, "--device", "l4", "-o", "l4", "--json")
    assert code == 0
    estimate = json.loads(out)["runs"][0]["estimated_seconds"]
    assert list(estimate["phases"]) == ["forward", "loss", "backward", "optimizer"]
    assert estimate["step"] == pytest.approx(sum(estimate["phases"].values()))
    code, out, _ = run("profile", *DEBUG, "--device", "l4", "-o", "again")
    assert f"step time (estimate) │ {format_seconds(estimate['step'])} │" in " ".join(out.split())


BAD = {
    "unknown target": (["profile", "lama2"], 2, 'no target "lama2"', "llama2"),
    "unknown preset": (["profile", "llama2", "--preset", "7B"], 2, 'no preset "7B"', "7b"),
    "unknown field": (["profile", "llama2", "--set", "layers=1"], 2, 'no setting "layers"', "n_layers"),
    "value of the wrong kind": (["profile", "llama2", "--set", "n_layers=two"], 2, '"two"', "whole number"),
    "not a setting": (
        ["profile", "llama2", "--set", "n_layers"],
        2,
        '"n_layers" is not a KEY=VALUE setting',
        "n_layers=1",
    ),
    "unknown strategy": (["profile", "llama2", "-s", "lor"], 2, 'unknown strategy "lor"', 'did you mean "lora"'),
    "unknown strategy key": (["profile", "llama2", "-s", "lora:rank=4"], 2, 'no setting "rank"', "targets"),
    "wrong strategy value": (["profile", "llama2", "-s", "amp:dtype=fp8"], 2, '"fp8"', "fp16"),
    "malformed plan": (["profile", "llama2", "-s", "r=4,lora"], 2, "malformed plan", "STRATEGY"),
    "the same strategy twice": (
        ["profile", "llama2", "-s", "lora,amp,lora:r=4"],
        2,
        '"lora" occurs 2 times',
        "name it once",
    ),
    "unknown device": (["profile", "llama2", "--device", "a100"], 2, 'no device "a100"', "a100-40gb"),
    "no step": (["profile", *DEBUG, "--steps", "0"], 2, "--steps", "x>=1"),
    "missing data": (["profile", *DEBUG, "data=nowhere.json"], 2, "nowhere.json", "data"),
    "missing tokenizer": (["profile", *DEBUG, "tokenizer=nowhere.model"], 2, "nowhere.model", "tokenizer"),
    "unknown command": (["profil"], 2, 'no command "profil"', "profile"),
    "unknown option": (["profile", "llama2", "--strategy", "lora"], 2, "--strategy", "--strategies"),
    "targets that match no module": (["profile", *DEBUG, "-s", "lora:targets=q_proj"], 2, "targets=q_proj", "wq"),
    "layers that are not there": (["profile", *DEBUG, "-s", "ckpt:layers=0-5"], 2, '"0-5"', "layers 0 to 1"),
    "a batch that does not divide": (["profile", *DEBUG, "-s", "ga:steps=3"], 2, "2 samples", "divides"),
}


@pytest.mark.parametrize(("words", "code", "what", "expected"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_message_that_says_what_and_what_was_expected(words, code, what, expected, run, tmp_path):
    ended, out, err = run(*words)
    assert ended == code
    assert what in err
    assert expected in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to record on")
def test_recording_on_a_gpu_where_there_is_none_says_how_to_simulate_one(run):
    code, out, err = run("profile", *DEBUG, "--device", "cuda")
    assert (code, out) == (2, "")
    assert "--device gpu" in err


def test_profiles_that_start_in_the_same_second_keep_folders_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(strftime=lambda _: "20260102-030405"))
    for folders in (["llama2-20260102-030405"], ["llama2-20260102-030405", "llama2-20260102-030405-2"]):
        code, _, err = run("profile", *DEBUG)
        assert code == 0, err
        assert sorted(path.name for path in (tmp_path / RUNS).iterdir()) == folders
    assert len(list(tmp_path.glob("*/*/baseline.npz"))) == 2


def test_a_trace_that_another_profile_wrote_meanwhile_is_not_overwritten(run, tmp_path, monkeypatch):
    folder, carry_out = tmp_path / "runs", profile.run_all

    def slowly(specs, report):
        ended = carry_out(specs, report)
        (folder / "baseline.npz").write_bytes(b"of the other one")
        return ended

    monkeypatch.setattr(profile, "run_all", slowly)
    code, _, err = run("profile", *DEBUG, "-o", folder)
    assert code == 2
    assert "baseline.npz exists already" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"baseline.npz": b"of the other one"}


def test_an_output_folder_that_cannot_be_made_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = run("profile", *DEBUG, "-o", tmp_path / "file" / "runs")
    assert code == 2
    assert "file/runs: the folder cannot be created (Not a directory)" in err
    assert "Traceback" not in err


def test_all_problems_of_a_plan_are_told_at_once(run):
    code, _, err = run("profile", *DEBUG, "-s", "lora:targets=q_proj,r=0,ckpt:layers=9")
    assert code == 2
    for text in ("q_proj", "r=0", '"9"'):
        assert text in err


def test_a_failing_forward_is_shown_as_the_targets_own_error(run, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "target.py").write_text(
        "import dataclasses, torch\nfrom memscope import Workload\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Config:\n    width: int = 4\n\n"
        "def loss(model, x):\n    raise ValueError('seven heads')\n\n"
        "def build(config):\n"
        "    model, batch = torch.nn.Linear(4, 4), torch.ones(2, config.width)\n"
        "    return Workload(model, [batch], loss, torch.optim.SGD, name='mine')\n"
    )
    code, _, err = run("profile", folder, "--device", "gpu")
    assert code == 1
    assert '"mine" failed: ValueError: seven heads' in err
    assert "target.py:9" in err
    assert "Traceback" not in err
    assert not (tmp_path / "memscope-runs").exists() or not list((tmp_path / "memscope-runs").iterdir())


def test_what_a_run_assumes_is_in_its_tables_its_document_and_its_page(run, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "target.py").write_text(
        "import torch\nfrom memscope import Workload\n\n"
        "def loss(model, x):\n"
        "    expert = model(x).argmax(-1)\n"
        "    return sum(model(x[expert == one]).sum() for one in range(4))\n\n"
        "def build(config):\n"
        "    return Workload(torch.nn.Linear(4, 4), [torch.ones(8, 4)], loss, torch.optim.SGD, name='mine')\n\n"
        "Config = __import__('dataclasses').make_dataclass('Config', [], frozen=True)\n"
    )
    words = ("profile", folder, "--device", "gpu")
    code, out, _ = run(*words, "--json", "--assume", "experts=worst", "-o", tmp_path / "worst")
    assert code == 0
    (assumption,) = json.loads(out)["runs"][0]["assumptions"]
    assert assumption["what"] == "the choices of torch.argmax"
    assert assumption["value"] == "always the first 1 of 4"
    assert "target.py:5, in loss: expert = model(x).argmax(-1)" in assumption["where"]
    assert "always the first 1 of 4" in (tmp_path / "worst" / "report.html").read_text()
    _, out, _ = run(*words, "-o", tmp_path / "even")
    assert "Assumed: the choices of torch.argmax: each of 4 equally often" in " ".join(out.split())
    code, _, err = run(*words, "--assume", "refuse", "-o", tmp_path / "none")
    assert code == 1
    assert "needs the value of a tensor" in err
    assert "target.py:6, in <genexpr>" in err


def test_a_target_of_ones_own_needs_a_folder_with_target_py_only(run, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "target.py").write_text(
        "import dataclasses, torch\nfrom memscope import Workload\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Config:\n    width: int = 4\n\n"
        "def build(config):\n"
        "    model = torch.nn.Linear(config.width, 4, bias=False)\n"
        "    batch = torch.ones(2, config.width)\n"
        "    return Workload(model, [batch], lambda m, x: m(x).sum(), torch.optim.SGD, name='mine')\n"
    )
    code, out, _ = run("profile", folder, "--device", "gpu", "--set", "width=1024", "--json")
    assert code == 0
    assert json.loads(out)["runs"][0]["parameters"]["total"] == 4096


def test_debug_shows_the_traceback(run):
    code, _, err = run("profile", "lama2", "--debug")
    assert code == 2
    assert "Traceback" in err


SMALL_GPU = """
[small]
vendor_name = "a GPU of 512 MiB"
capability = "8.0"
capacity_bytes = 536_870_912
multiprocessors = 108
context_bytes = 104_857_600
"""


def test_a_target_that_does_not_fit_ends_in_exit_code_4_and_says_where_it_runs_out(run, tmp_path):
    (tmp_path / "small.toml").write_text(SMALL_GPU)
    words = ("profile", *DEBUG, "dim=1536", "--device", "small", "--device-file", "small.toml")
    code, out, err = run(*words)
    assert code == 4, err
    text = " ".join(out.split())
    # The context leaves 412 MiB of 512. Two layers of about 12 x 1536^2 weights of 4 bytes, embedding and head fit
    # once, not four times.
    assert "baseline does not fit: it runs out of memory in step 0" in text
    assert "412.0 MiB" in text
    assert "values below assume unlimited memory" in text
    code, out, _ = run(*words, "-s", "lora:r=1", "--json")
    document = json.loads(out)
    assert code == 0, "the plan that was asked for fits"
    baseline, lora = document["runs"]
    assert baseline["out_of_memory"]["limit"] == 412 * 2**20
    assert baseline["out_of_memory"]["phase"] in ("backward", "optimizer")
    assert lora["out_of_memory"] is None
    peak = lora["peak"]
    assert peak["requested"] <= peak["allocated"] == peak["active"] <= peak["reserved"] == peak["device"] - 104_857_600
    assert not baseline["fit"]["fits"]
    assert (lora["fit"]["needed"], lora["fit"]["available"]) == (peak["device"], 512 * 2**20)
    assert (lora["fit"]["fits"], lora["fit"]["safe"]) == (True, False), "the context alone may be 1.16 GiB larger"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--allocator", "expandable_segment:True"], "expandable_segments"),
        (["--allocator", "version:2.4", "--device", "cpu"], "the allocator of the installed PyTorch"),
        (["--device", "small"], "gpu"),
        (["--device-file", "nowhere.toml"], "nowhere.toml"),
        (["--assume", "expert=worst"], 'did you mean "experts=worst"'),
        (["--device", "cpu", "--assume", "refuse"], "--assume is for simulations"),
    ],
)
def test_wrong_devices_and_allocator_settings_are_refused(words, expected, run, tmp_path):
    code, _out, err = run("profile", *DEBUG, *words)
    assert code == 2
    assert expected in err
    assert list(tmp_path.iterdir()) == []
