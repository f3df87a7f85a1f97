"""`memscope report`: what it makes of trace files, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from traces import TraceBuilder

from memscope.analysis.grid import Cell, Grid
from memscope.analysis.ledger import Ledger, Line
from memscope.cli.grid_document import grid_document
from memscope.cli.main import main
from memscope.dashboards.demo import training_run
from memscope.trace import SCHEMA_VERSION, Trace

GIB = 2**30


def run(layers: int = 1, **meta: Any) -> Trace:
    """A parameter of 1 GiB in each layer, then an activation of 2 GiB."""
    built = TraceBuilder()
    built.phase("setup")
    for layer in range(layers):
        built.new("parameter", GIB, module=f"layers.{layer}")
    built.phase("forward", 0)
    built.free(built.new("activation", 2 * GIB, module="output_*", op="aten.mm"))
    return built.trace({"target": "t", "device": {"name": "gpu", "simulated": True}} | meta)


_TEXTS = ("terminal", "markdown", "json", "csv")
Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Runs the command; gives its exit code and what it wrote on stdout and stderr."""

    def command(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["report", *map(str, words)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    return run().save(tmp_path / "run.npz")


def test_a_page_is_written_beside_the_trace(report: Report, trace_file: Path) -> None:
    code, out, _ = report(trace_file)
    page = trace_file.with_suffix(".html")
    assert code == 0
    assert f"Page: {page}" in out
    assert f"Next: memscope export {trace_file} --to perfetto" in out
    assert "<dd>3.00 GiB</dd>" in page.read_text(encoding="utf-8")


def test_several_traces_are_one_page_that_compares_them(report: Report, trace_file: Path) -> None:
    other = run(5).save(trace_file.parent / "other.npz")
    code, out, _ = report(trace_file, other)
    page = trace_file.parent / "report.html"
    assert (code, f"Page: {page}" in out) == (0, True)
    assert "other against run: +4.00 GiB" in page.read_text(encoding="utf-8")
    assert "No Table 1: steps or operations are unknown for run, other" in out


def test_files_alike_in_name_are_named_by_their_path(report: Report, trace_file: Path) -> None:
    folder = trace_file.parent / "second"
    folder.mkdir()
    other = run(2).save(folder / "run.npz")
    _, out, _ = report(trace_file, other, "--format", "csv")
    assert {row["run"] for row in csv.DictReader(io.StringIO(out))} == {str(trace_file), str(other)}


@pytest.mark.parametrize(
    ("suffix", "beginning"),
    [(".md", "# t on gpu"), (".json", "{"), (".csv", "run,category"), (".txt", "t on gpu"), (".html", "<!DOCTYPE")],
)
def test_the_format_follows_from_the_name_of_the_file(
    report: Report, trace_file: Path, suffix: str, beginning: str
) -> None:
    output = trace_file.parent / f"out{suffix}"
    assert report(trace_file, "-o", output)[0] == 0
    assert output.read_text(encoding="utf-8").startswith(beginning)


def test_html_is_another_name_of_the_output(report: Report, trace_file: Path) -> None:
    assert report(trace_file, "--html", trace_file.parent / "page.html")[0] == 0
    assert (trace_file.parent / "page.html").exists()


def test_csv_has_what_is_alive_at_the_peak(report: Report, trace_file: Path) -> None:
    _, out, _ = report(trace_file, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows == [
        {"run": "run", "category": "activation", "module": "output_*", "op": "aten.mm", "bytes": str(2 * GIB)}
        | {"inferred": ""},
        {"run": "run", "category": "parameter", "module": "layers.0", "op": "", "bytes": str(GIB), "inferred": ""},
    ]


def test_what_is_inferred_is_said_beside_it_in_every_format(report: Report, tmp_path: Path) -> None:
    file = run(inferred=["category", "micro_batch"]).save(tmp_path / "run.npz")
    how = "Inferred from stacks, not recorded: category and micro-batch, by the functions that ran at each allocation"
    terminal, markdown, document, table = (report(file, "--format", f)[1] for f in _TEXTS)
    for text in (terminal, markdown):
        assert "parameter (inferred)" in text
        assert how in " ".join(text.replace("\\", "").split())
    assert json.loads(document)["runs"][0]["inferred"] == ["category", "micro_batch"]
    assert json.loads(document)["runs"][0]["how_inferred"].startswith(how)
    assert {row["inferred"] for row in csv.DictReader(io.StringIO(table))} == {"category micro_batch"}


def test_json_has_whole_bytes_and_the_largest_allocations(report: Report, trace_file: Path) -> None:
    _, out, _ = report(trace_file, "--format", "json")
    document = json.loads(out)
    assert document["schema_version"] == 1
    (shown,) = document["runs"]
    assert shown["peak"]["allocated"] == 3 * GIB
    assert shown["at_peak"]["parameter"] == GIB
    assert shown["largest"][0] == {
        "size_bytes": 2 * GIB, "category": "activation", "module": "output_*", "op": "aten.mm", "born": 1,
        "born_in": "step 0 · forward · micro-batch 0", "freed": 2, "freed_in": "step 0 · forward",
    }  # fmt: skip
    assert shown["ledger"] is None


def test_markdown_is_escaped_and_its_tables_are_whole(report: Report, trace_file: Path) -> None:
    _, out, _ = report(trace_file, "--format", "markdown")
    assert "| peak | 3.00 GiB |" in out
    assert "| 2.00 GiB | activation | output\\_\\*, aten.mm |" in out
    tables = [line for line in out.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_terminal_tables_are_no_wider_than_the_terminal(
    report: Report, trace_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = report(trace_file, "--format", "terminal")
    assert "Largest allocations at the peak of run" in out
    assert max(map(len, out.splitlines())) <= 60


def test_table_1_compares_runs_that_have_steps_and_operations(report: Report, tmp_path: Path) -> None:
    trace = training_run()
    trace.meta["flops"] = [10, 10]  # type: ignore[index]  # made here, as a dict
    files = [trace.save(tmp_path / f"{name}.npz") for name in ("plain", "again")]
    _, out, _ = report(*files, "--format", "json")
    assert json.loads(out)["table1"] == {
        "again": dict.fromkeys(("parameter", "activation", "gradient", "optimizer_state", "computation"), "–")
    }


def test_a_measured_run_is_held_against_its_prediction_and_not_put_into_table_1(
    report: Report, trace_file: Path
) -> None:
    measured = run(2, device={"name": "gpu", "simulated": False}).save(trace_file.parent / "measured.npz")
    _, out, _ = report(trace_file, measured, "--format", "json")
    document = json.loads(out)
    assert document["table1"] == {}
    (held,) = document["agreement"]
    assert held["bytes"]["parameter"] == {"predicted": GIB, "measured": 2 * GIB}


def test_a_checkpoint_plan_is_drawn_on_the_page(report: Report, trace_file: Path) -> None:
    plan = trace_file.parent / "plan.json"
    layers = {"layers.0": "full", "layers.1": "none"}
    content = {"format": "memscope-checkpoint-plan", "schema_version": 1, "layers": layers, "made_for": {}}
    plan.write_text(json.dumps(content))
    assert report(trace_file, plan)[0] == 0
    page = trace_file.with_suffix(".html").read_text(encoding="utf-8")
    assert "Checkpointed: layers.0 full, layers.1 none" in page


def refusal(report: Report, *words: object) -> tuple[int, str]:
    code, _, err = report(*words)
    assert "Traceback" not in err
    return code, err.strip()


def test_what_is_not_a_trace_is_refused(report: Report, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    assert refusal(report, tmp_path / "text.npz") == (
        2,
        f"memscope: error: {tmp_path}/text.npz: not a memscope trace, or truncated: expected a file written by "
        "memscope profile",
    )
    assert "no such file" in refusal(report, tmp_path / "absent.npz")[1]


def test_a_pickle_is_refused_with_what_to_do(report: Report, tmp_path: Path) -> None:
    (tmp_path / "snapshot.pickle").write_bytes(pickle.dumps({}))
    code, told = refusal(report, tmp_path / "snapshot.pickle")
    assert (code, "memscope import" in told) == (2, True)


def test_a_trace_of_a_newer_memscope_is_refused(report: Report, trace_file: Path) -> None:
    with np.load(trace_file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    header = json.loads(str(arrays["header"])) | {"schema_version": SCHEMA_VERSION + 1}
    np.savez(trace_file, **arrays | {"header": np.array(json.dumps(header))})
    code, told = refusal(report, trace_file)
    assert (code, told.endswith("upgrade memscope")) == (2, True)


def test_an_empty_trace_is_refused(report: Report, tmp_path: Path) -> None:
    built = TraceBuilder()
    built.phase("setup")
    code, told = refusal(report, built.trace().save(tmp_path / "empty.npz"))
    assert (code, "empty.npz: the trace is empty" in told) == (2, True)


def test_a_file_that_exists_is_kept_unless_forced(report: Report, trace_file: Path) -> None:
    output = trace_file.parent / "out.md"
    output.write_text("mine")
    code, told = refusal(report, trace_file, "-o", output)
    assert (code, "exists already" in told, output.read_text()) == (2, True, "mine")
    assert report(trace_file, "-o", output, "-f")[0] == 0
    assert output.read_text(encoding="utf-8").startswith("# t on gpu")


def test_an_output_that_cannot_be_written_is_told_before_anything_is_drawn(report: Report, trace_file: Path) -> None:
    code, told = refusal(report, trace_file, "-o", trace_file.parent / "absent" / "page.html")
    assert (code, "there is no folder" in told) == (2, True)
    code, told = refusal(report, trace_file, "-o", trace_file.parent, "-f")
    assert (code, "is a folder: -o takes a file" in told) == (2, True)


PLAN = {"format": "memscope-checkpoint-plan", "schema_version": 1, "layers": {"layers.0": "full"}, "made_for": {}}


def test_a_plan_alone_or_in_a_text_is_refused(report: Report, trace_file: Path) -> None:
    plan = trace_file.parent / "plan.json"
    plan.write_text(json.dumps(PLAN))
    code, told = refusal(report, plan)
    assert (code, "add a trace of memscope profile" in told) == (2, True)
    code, told = refusal(report, trace_file, plan, "--format", "markdown")
    assert (code, "only a page can show" in told) == (2, True)


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    """Table 2 of one strategy: without it the run needs 58 GiB and does not fit, with it 31."""
    cells = (Cell((False,), False, 58 * GIB, 60 * GIB, None), Cell((True,), True, 31 * GIB, 33 * GIB, 120.0))
    grid = Grid("t", "a100-40gb", True, ("lora",), cells, 200, None, 39 * GIB)
    notes = ["Predicted: nothing was computed."]
    path = tmp_path / "grid.out"
    path.write_text(json.dumps(grid_document(grid, [[], ["lora"]], [Path("a"), Path("b")], notes)))
    return path


def test_table_2_is_told_by_its_content_and_has_a_page_alone_or_with_traces(
    report: Report, grid_file: Path, trace_file: Path
) -> None:
    assert report(grid_file)[0] == 0
    page = grid_file.with_suffix(".html").read_text(encoding="utf-8")
    assert "<td>× 59,392.0</td>" in page
    assert "Predicted: nothing was computed." in page
    assert report(trace_file, grid_file)[0] == 0
    page = trace_file.with_suffix(".html").read_text(encoding="utf-8")
    assert page.index("Table 2: t on a100-40gb, predicted") < page.index('id="run0"')


def test_table_2_is_in_every_text(report: Report, grid_file: Path, trace_file: Path) -> None:
    for words in ([grid_file], [trace_file, grid_file]):
        assert "Table 2: t on a100-40gb, predicted" in report(*words, "--format", "terminal")[1]
        assert "| – | × 59,392.0 | × 61,440.0 | × |" in report(*words, "--format", "markdown")[1]
        (document,) = json.loads(report(*words, "--format", "json")[1])["table2"]
        assert document["table2"][1]["peak"] == {"allocated": 31 * GIB, "reserved": 33 * GIB}
    rows = list(csv.DictReader(io.StringIO(report(grid_file, "--format", "csv")[1])))
    assert [(row["lora"], row["fits"], row["how"]) for row in rows] == [
        ("0", "0", "predicted"),
        ("1", "1", "predicted"),
    ]
    code, told = refusal(report, trace_file, grid_file, "--format", "csv")
    assert (code, "CSV is one table" in told) == (2, True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{}", "neither a checkpoint plan nor Table 2: expected a trace"),
        ("[1, 2]", "neither a checkpoint plan nor Table 2"),
        ('{"table2": [', "truncated or damaged JSON"),
        ('{"table2": []}', "a damaged Table 2: the file has no schema_version"),
    ],
)
def test_json_that_is_nothing_to_report_is_refused(report: Report, tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "some.json"
    file.write_text(content)
    code, error = refusal(report, file)
    assert (code, told in error, str(file) in error) == (2, True, True)


def test_a_file_named_twice_is_refused(report: Report, trace_file: Path) -> None:
    assert "is named twice" in refusal(report, trace_file, trace_file)[1]


def test_a_trace_is_a_table_in_a_notebook_and_in_a_terminal() -> None:
    out = io.StringIO()
    Console(width=100, file=out).print(run())
    for text in ("t: 2 allocations", "66.7%", "step 0, forward; gpu, simulated"):
        assert text in out.getvalue()
    assert "66.7%" in run()._repr_html_()
    assert "&lt;b&gt;" in run(target="<b>")._repr_html_()
    assert TraceBuilder().trace()._repr_html_()


def test_a_ledger_is_a_table_in_a_notebook_and_in_a_terminal() -> None:
    found = Ledger((Line("device", 2**30, 3 * 2**30, "nvidia-smi", estimate=True),), "a note")
    out = io.StringIO()
    Console(width=100, file=out).print(found)
    for text in ("device (estimate)", "+1.00 GiB", "3.00 GiB", "nvidia-smi", "a note"):
        assert text in out.getvalue()
        assert text in found._repr_html_()


def test_a_report_of_one_trace_needs_no_torch(trace_file: Path) -> None:
    script = (
        "import sys\nfrom memscope.cli.main import main\n"
        "try:\n    main(['report', sys.argv[1]])\n"
        "except SystemExit as ended:\n    print(ended.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(trace_file)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
