"""`memscope study budget`: what a budget of time buys."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from memscope.cli.main import main
from memscope.dashboards.budget_page import tokens_by_parameters
from memscope.simulation.devices.catalogue import get_device
from memscope.studies import budget
from memscope.studies.budget import BudgetQuestion, Optimum, Spent, TimeBudget, spend

DEVICE = get_device("a100-40gb")
SMALL = {"dim": "16", "n_heads": "2", "vocab_size": "256", "seq_len": "8"}


def question(**changes: Any) -> BudgetQuestion:
    given: dict[str, Any] = dict(
        target="targets/gpt", preset=None, settings=SMALL, vary="n_layers", sizes=["1", "2"], batches=[2],
        strategies="", device=DEVICE, seconds=3600.0,
    )  # fmt: skip
    return BudgetQuestion(**(given | changes))


def spent(**changes: Any) -> Spent:
    given: dict[str, Any] = dict(
        size="18", parameters=10**8, micro_batch=8, needed_bytes=2**30, fits=True, step_seconds=0.5, iterations=100,
        tokens=10**9, mfu=0.4,
    )  # fmt: skip
    return Spent(**(given | changes))


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["study", "budget", "targets/gpt", *words])
    return int(str(end.value.code))


def test_the_optimum_has_twenty_tokens_for_each_parameter() -> None:
    # Chinchilla's table 3: 1.92e19 operations for 400 million parameters and 8.0 billion tokens, by 6 · N · D
    optimum = Optimum(6 * 400e6 * 8.0e9)
    assert (optimum.parameters, optimum.tokens) == (pytest.approx(400e6), pytest.approx(8.0e9))


def test_a_device_at_its_peak_for_three_hours_is_the_reported_optimum() -> None:
    # Reported: 170 million parameters and 3.4 billion tokens. 312 TFLOP/s · 10,800 s = 6 · N · 20 N
    peak = TimeBudget(question(seconds=10_800.0), ()).at_peak
    assert peak.parameters == pytest.approx(math.sqrt(312e12 * 10_800 / 120))
    assert (peak.parameters / 170e6, peak.tokens / 3.4e9) == (pytest.approx(1, abs=0.02), pytest.approx(1, abs=0.02))


def test_the_best_case_has_the_smallest_expected_loss_of_those_that_fit() -> None:
    few, many = spent(), spent(tokens=2 * 10**9)
    other = spent(tokens=4 * 10**9, fits=False)
    unused = spent(tokens=0, iterations=0)
    assert TimeBudget(question(), (few, many, other, unused)).best is many
    assert TimeBudget(question(), (other,)).best is None
    # equation 10: 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28
    assert few.loss == pytest.approx(1.69 + 406.4 / 1e8**0.34 + 410.7 / 1e9**0.28)


def test_iterations_tokens_and_mfu_follow_from_the_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "last_step_seconds", lambda trace: 0.5)
    one, two = spend(question(settings={**SMALL, "style": "llama"}, batches=[2])).rows
    # 256 rows; in each layer 4 · 16² of attention, 3 matrices of 16 by ⌊8 · 16 / 3⌋, and 2 norms; the last norm
    layer = 4 * 16**2 + 3 * 16 * 42 + 2 * 16
    assert [one.parameters, two.parameters] == [256 * 16 + layer + 16, 256 * 16 + 2 * layer + 16]
    assert (one.iterations, one.tokens) == (7200, 7200 * 2 * 8)
    # A layer more: 2 operations for each of 16 tokens and each weight forward, twice as many backward. Attention: two
    # products forward and five backward, each of 2 samples · 2 heads · 8 · 8 tokens · 8 channels.
    flops = 6 * 16 * (layer - 2 * 16) + 7 * 2 * (2 * 2 * 8 * 8 * 8)
    assert two.mfu - one.mfu == pytest.approx(flops / 0.5 / 312e12)


def test_a_budget_is_printed_as_json_and_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "budget.html"
    settings = [f"{key}={value}" for key, value in SMALL.items()]
    words = ["--time", "1h", "--device", "a100-40gb", "--vary", "n_layers=1", "--batches", "2", "--html", str(page)]
    assert run(*words, "--json", *settings) == 0
    document = json.loads(capsys.readouterr().out)
    [row] = document["rows"]
    assert (document["budget_seconds"], row["size"], row["micro_batch"]) == (3600.0, "1", 2)
    assert row["iterations"] == int(3600 / row["estimated_step_seconds"])
    assert f"<td>{row['parameters']:,}</td>" in page.read_text()


def test_the_figure_has_a_line_for_each_micro_batch_that_fits_and_the_optimum() -> None:
    rows = (spent(), spent(parameters=2 * 10**8), spent(micro_batch=16), spent(micro_batch=32, fits=False))
    figure = tokens_by_parameters(TimeBudget(question(), rows))
    lines = {line.name: (list(line.x), list(line.y)) for line in figure.data}
    assert lines["micro-batch 8"] == ([10**8, 2 * 10**8], [10**9, 10**9])
    assert "micro-batch 16" in lines
    assert "micro-batch 32" not in lines
    [x], [y] = lines["compute-optimal"]
    assert y == pytest.approx(20 * x)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "gpu"], 'a time budget needs the rates of a device, and those of "gpu" are not known'),
        (["--device", "a100-40gb", "--vary", "n_layers"], '--vary "n_layers": expected a setting and its values'),
        (["--device", "a100-40gb", "--vary", "layers=1"], 'no setting "layers"'),
        (["--device", "a100-40gb", "--batches", "8/x"], '--batches "8/x": expected whole numbers from 1'),
        (["--device", "a100-40gb", "--time", "soon"], '"soon" is not a time'),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(["--time", "1h"] if "--time" not in words else []), *words) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_study_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["study", "buget"])
    assert end.value.code == 2
    assert 'no study "buget": did you mean "budget"?' in capsys.readouterr().err
