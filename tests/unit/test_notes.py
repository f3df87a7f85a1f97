"""What a reader must know to believe a trace is said wherever the trace is shown."""

from __future__ import annotations

import io
import json
from html import escape
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn
from traces import TraceBuilder

from memscope import Trace, Workload, advise, record, simulate
from memscope.analysis.effects import Run, Table1
from memscope.analysis.notes import notes_of
from memscope.cli.advise_report import print_advice
from memscope.cli.main import cli
from memscope.cli.report_tables import comparison_sections
from memscope.cli.table_sections import print_sections
from memscope.dashboards.plan_page import write_plan_page
from memscope.trace.notes import add_note


def overflowing(factor: float, steps: int) -> Trace:
    """A run whose scaled gradients are 2 * factor * 65,536 (32,768 after a skip); fp16 holds at most 65,504."""

    def build() -> Workload:
        loss = lambda model, x: model(x).float().sum() * factor  # noqa: E731
        return Workload(nn.Linear(4, 4), [torch.ones(2, 4)], loss, torch.optim.AdamW, name="m")

    return record(build, device="cpu", strategies="amp:dtype=fp16", steps=steps)


def shown(trace: Trace) -> str:
    out = io.StringIO()
    print_sections(Console(file=out, width=200), comparison_sections([Run("amp", trace)], Table1(()), ()))
    return out.getvalue()


@pytest.mark.parametrize(("factor", "left_out"), [(4.0, 2), (0.6, 1), (0.25, 0)])
def test_skipped_steps_are_counted_and_reported(factor: float, left_out: int) -> None:
    trace = overflowing(factor, steps=2)
    assert (trace.max_by_category()["optimizer_state"] > 0) == (left_out < 2)
    told = f"skipped {left_out} of 2 optimizer steps"
    assert (told in " ".join(notes_of(trace))) == (told in shown(trace)) == (left_out > 0)


def test_a_note_is_added_once() -> None:
    meta: dict[str, object] = {}
    for text in ("one", "two", "one"):
        add_note(meta, text)
    assert meta == {"notes": ["one", "two"]}


NOTE = "Half of it was guessed"


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    built = TraceBuilder()
    built.phase("setup")
    built.new("parameter", 1024)
    return built.trace({"notes": [NOTE]}).save(tmp_path / "noted.npz")


@pytest.mark.parametrize(
    "words",
    [
        ["report", "--format", "terminal"],
        ["report", "--format", "markdown"],
        ["report", "--format", "json"],
        ["diff"],
        ["diff", "--json"],
        ["check", "--fail-if", "peak:1GiB"],
        ["check", "--fail-if", "peak:1GiB", "--format", "json"],
    ],
    ids=" ".join,
)
def test_every_output_of_a_trace_has_its_notes(words: list[str], noted: Path) -> None:
    files = [str(noted)] * (2 if words[0] == "diff" else 1)
    result = CliRunner().invoke(cli, [words[0], *files, *words[1:]], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"{NOTE}." in result.output


def test_the_page_and_the_notebook_have_the_notes(noted: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert CliRunner().invoke(cli, ["report", str(noted), "--html", str(page)]).exit_code == 0
    assert f"{NOTE}." in page.read_text()
    assert f"{NOTE}." in (Trace.load(noted)._repr_html_() or "")


def test_the_json_document_of_a_profile_has_the_notes() -> None:
    from memscope.cli.profile_report import document

    trace = simulate(lambda: Workload(nn.Linear(4, 4), [torch.ones(2, 4)], lambda m, x: m(x).sum(), torch.optim.SGD))
    add_note(trace.meta, NOTE)  # type: ignore[arg-type]
    found = document("m", [Run("m", trace)], [Path("m.npz")], Table1(()), None)
    assert json.loads(json.dumps(found))["runs"][0]["notes"] == [f"{NOTE}."]


def on_a_stream(called: bool = True) -> Workload:
    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = model(x)
        if called:
            y.record_stream(torch.cuda.current_stream())
        return y.sum()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return Workload(model, [torch.ones(2, 4)], loss, torch.optim.SGD, name="m")


def test_a_simulation_that_ignores_record_stream_says_so() -> None:
    assert "record_stream" in " ".join(notes_of(simulate(on_a_stream)))
    assert notes_of(simulate(lambda: on_a_stream(False))) == []


def test_an_advice_has_the_notes_of_its_trace(tmp_path: Path) -> None:
    found = advise(on_a_stream, budget="1GB", device="a100-40gb", strategies="ga:steps=1")
    assert found.trace is not None
    (note,) = notes_of(found.trace)
    out = io.StringIO()
    print_advice(Console(file=out, width=1000), found, [])
    assert f"Note: {note}" in out.getvalue()
    assert note in found.document()["notes"]
    write_plan_page(found, tmp_path / "plan.html", overwrite=False)
    assert escape(note) in (tmp_path / "plan.html").read_text()
