"""`memscope profile --grid` as a user meets it."""

import json

import pytest

DEBUG = ["llama2", "--preset", "debug", "--set", "n_layers=2", "accumulation=2", "seq_len=32"]


def test_the_grid_has_every_combination_with_a_prediction_and_a_trace(run, tmp_path):
    words = ["--grid", "ga:steps=2,lora", "--samples", "20", "-o", "out", "--table", "t.csv", "--json"]
    code, out, err = run("profile", *DEBUG, "--device", "l4", *words)
    assert code == 0, err
    document = json.loads(out)
    assert document["device"] == {"name": "l4", "simulated": True}
    rows = document["table2"]
    assert {row["samples_per_step"] for row in rows} == {2}
    assert [row["strategies"] for row in rows] == [[], ["lora"], ["ga:steps=2"], ["lora", "ga:steps=2"]]
    assert rows[3]["applied"] == {"ga:steps=2": True, "lora": True}
    for row in rows:
        assert row["fits"]
        assert row["peak"]["allocated"] < row["peak"]["reserved"]
        assert row["seconds"] is None
        assert row["estimated_seconds"] > 0
        assert (tmp_path / row["trace"]).is_file()
    # Alone, lora trains less than everything; with ga one sample of 32 tokens is there at a time instead of two.
    assert rows[1]["peak"]["allocated"] < rows[0]["peak"]["allocated"]
    assert rows[3]["peak"]["allocated"] < rows[1]["peak"]["allocated"]
    assert any("same effective batch in one micro-batch (ga)" in note for note in document["notes"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Table 2: llama2 on l4, predicted" in page
    (tmp_path / "grid.json").write_text(out)
    assert "Table 2: llama2 on l4, predicted" in run("report", "grid.json", "--format", "terminal")[1]
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + 4


def test_a_grid_of_alternatives_on_the_cpu_is_measured(run):
    code, out, err = run("profile", *DEBUG, "--device", "cpu", "--grid", "lora:r=16/4", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [row["applied"] for row in document["table2"]] == [
        {"lora": False, "lora:r=4": False}, {"lora": True, "lora:r=4": False}, {"lora": False, "lora:r=4": True},
    ]  # fmt: skip
    assert document["device"] == {"name": "cpu", "simulated": False}
    assert all(row["seconds"] > 0 and row["estimated_seconds"] is None for row in document["table2"])


def test_a_setting_that_varies_is_a_factor_whose_runs_have_its_values(run, tmp_path):
    words = ["llama2", "--preset", "debug", "--set", "n_layers=1", "seq_len=32", "--vary", "accumulation=1/2"]
    code, out, err = run("profile", *words, "--device", "l4", "--grid", "lora", "--samples", "4", "-o", "out", "--json")
    assert code == 0, err
    rows = json.loads(out)["table2"]
    assert [list(row["applied"].items()) for row in rows[1::2]] == [
        [("accumulation=1", True), ("accumulation=2", False), ("lora", True)],
        [("accumulation=1", False), ("accumulation=2", True), ("lora", True)],
    ]
    assert [row["samples_per_step"] for row in rows] == [1, 1, 2, 2]
    assert [row["strategies"] for row in rows] == [[], ["lora"], [], ["lora"]]
    # With two micro-batches the second one runs beside the gradients of the first.
    assert rows[3]["peak"]["allocated"] > rows[1]["peak"]["allocated"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npz")) == [
        "accumulation=1+lora.npz", "accumulation=1.npz", "accumulation=2+lora.npz", "accumulation=2.npz",
    ]  # fmt: skip


BAD = {
    "unknown factor": (["--grid", "ga,lor"], 'unknown strategy "lor"', 'did you mean "lora"'),
    "the same factor twice": (["--grid", "lora,lora:r=4"], '"lora" occurs 2 times', "name it once"),
    "the same alternative twice": (["--grid", "lora:r=4/8/4"], '"lora:r=4" is twice', "leave one out"),
    "no factor": (["--grid", ""], "no strategy", "--grid ga,amp,lora"),
    "another plan beside it": (["--grid", "ga,lora", "-s", "amp"], '-s "amp"', "leave out"),
    "a factor that cannot be applied": (["--grid", "lora,ga:steps=3"], "2 samples", "divides"),
    "factors that conflict": (["--grid", "amp,bf16"], "cannot be combined", "remove one"),
    "a factor planned by memscope": (["--grid", "lora,ckpt:auto,budget=1GB"], "ckpt:auto", "name the layers"),
    "a setting that varies without a grid": (["--vary", "n_layers=1/2"], "--vary", "--grid"),
    "a setting that varies without values": (["--grid", "lora", "--vary", "n_layers"], '"n_layers"', "n_layers=1/32"),
    "a setting that is set and varies": (["--grid", "lora", "--vary", "n_layers=1/2"], '"n_layers"', "leave one out"),
    "a setting that varies by one value twice": (["--grid", "lora", "--vary", "lr=1/1"], '"lr=1/1"', "leave one out"),
    "an unknown setting that varies": (["--grid", "lora", "--vary", "layers=1/2"], '"layers"', "n_layers"),
    "samples without a grid": (["-s", "lora", "--samples", "10"], "--samples", "--grid"),
    "less memory of a simulated device": (["--grid", "lora", "--memory", "40GB"], "--memory", "--device-file"),
    "memory that is no size": (["--grid", "lora", "--memory", "much"], '"much" is not a size', "40GB"),
    "a table of an unknown kind": (["--grid", "lora", "--table", "t.xls"], "t.xls", ".csv or .md"),
    "a table in no folder": (["--grid", "lora", "--table", "no/t.md"], "there is no folder no", "create it"),
}


@pytest.mark.parametrize(("words", "what", "expected"), BAD.values(), ids=BAD)
def test_bad_grids_end_in_one_message_and_leave_nothing(words, what, expected, run, tmp_path):
    code, out, err = run("profile", *DEBUG, "--device", "gpu", *words)
    assert (code, out) == (2, "")
    assert what in err
    assert expected in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_exists_is_kept_unless_forced(run, tmp_path):
    (tmp_path / "t.md").write_text("mine")
    code, _, err = run("profile", *DEBUG, "--device", "gpu", "--grid", "lora", "--table", "t.md")
    assert code == 2
    assert "t.md exists already" in err
    assert (tmp_path / "t.md").read_text() == "mine"
