"""Table 2 on a page and as a document: peaks against what there is, what runs out, and what is damaged."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from memscope.analysis.grid import Cell, Grid
from memscope.cli.grid_document import grid_document, grid_of
from memscope.dashboards.grid_card import grid_card, grid_peaks
from memscope.dashboards.palette import DARK, LIGHT
from memscope.errors import UsageError

GIB = 2**30


def grid(*, predicted: bool = True, limit: int | None = 39 * GIB) -> Grid:
    """The first combination does not fit; what it would need is known if that was predicted."""
    need = (58 * GIB, 60 * GIB) if predicted else (None, None)
    cells = (Cell((False,), False, *need, None), Cell((True,), True, 31 * GIB, 33 * GIB, 120.0))
    return Grid("mine", "a100-40gb", predicted, ("lora:r=8",), cells, 200, None, limit)


def curve(name: str, found: Any) -> Any:
    return next(one for one in found.data if one.name == name)


def test_each_combination_is_a_bar_and_what_runs_out_has_a_cross() -> None:
    figure = grid_peaks(grid())
    assert (curve("allocated", figure).y, curve("allocated", figure).x) == ((1,), (31,))
    assert curve("allocated, does not fit", figure).x == (58,)
    assert curve("reserved", figure).x == (60, 33)
    assert (curve("runs out of memory", figure).y, curve("runs out of memory", figure).x) == ((0,), (60,))
    assert figure.layout.yaxis.ticktext == ("none", "lora")
    assert [shape.x0 for shape in figure.layout.shapes] == [39]
    assert figure.layout.xaxis.title.text == "GiB, predicted<br>dotted: 39.0 GiB is the limit"


def test_alternatives_of_one_strategy_are_named_with_their_settings() -> None:
    cells = (Cell((True, False, True), True, GIB, GIB, 1.0), Cell((False, True, False), True, GIB, GIB, 1.0))
    found = dataclasses.replace(grid(), factors=("lora:r=8", "lora", "amp:dtype=bf16"), cells=cells)
    assert grid_peaks(found).layout.yaxis.ticktext == ("lora:r=8 + amp", "lora")


def test_a_measured_combination_that_ran_out_has_its_cross_at_what_there_was() -> None:
    figure = grid_peaks(grid(predicted=False))
    assert curve("runs out of memory", figure).x == (39,)
    assert "allocated, does not fit" not in [one.name for one in figure.data]
    assert "measured" in figure.layout.xaxis.title.text


def test_a_limit_far_away_is_told_and_not_drawn() -> None:
    figure = grid_peaks(grid(limit=800 * GIB))
    assert len(figure.layout.shapes) == 0
    assert figure.layout.xaxis.title.text == "GiB, predicted<br>800.0 GiB is the limit"


def test_the_figure_is_painted_in_its_theme() -> None:
    assert curve("allocated", grid_peaks(grid())).marker.color == LIGHT.categories["workspace"]
    assert curve("allocated", grid_peaks(grid(), DARK)).marker.color == DARK.categories["workspace"]


def test_the_card_has_every_figure_and_says_that_it_is_predicted() -> None:
    html = grid_card(grid(), ["Predicted: <nothing> was computed."]).html
    assert "Table 2: mine on a100-40gb, predicted" in html
    assert "<td>× 59,392.0</td><td>× 61,440.0</td><td>×</td>" in html
    assert "<td>✓</td><td>31,744.0</td><td>33,792.0</td><td>120 s</td>" in html
    assert "Predicted: &lt;nothing&gt; was computed." in html


@pytest.mark.parametrize("predicted", [True, False])
def test_a_document_gives_the_table_back(predicted: bool) -> None:
    document = grid_document(grid(predicted=predicted), [[], ["lora:r=8"]], [Path("a"), Path("b")], ["a note"])
    assert grid_of(json.loads(json.dumps(document))) == (grid(predicted=predicted), ["a note"])


def test_a_combination_whose_run_failed_has_no_bar_no_cross_and_no_trace(tmp_path: Path) -> None:
    earlier = tmp_path / "of-an-earlier-run.npz"
    earlier.touch()
    failed = Cell((False,), None, None, None, None, "it was killed")
    found = dataclasses.replace(grid(), cells=(failed, grid().cells[1]))
    assert [one.name for one in grid_peaks(found).data] == ["allocated", "reserved"]
    assert "<td>?</td><td>?</td><td>?</td>" in grid_card(found, []).html
    document = grid_document(found, [[], ["lora:r=8"]], [earlier, earlier], [])
    assert (document["table2"][0]["failure"], document["table2"][0]["trace"]) == ("it was killed", None)
    assert document["table2"][1]["trace"] == str(earlier)
    assert grid_of(json.loads(json.dumps(document)))[0] == found


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"factors": 3}, "a damaged Table 2: factors is 3: expected a list; expected the output of memscope profile"),
        ({"factors": ["other"]}, 'a damaged Table 2: table2[0].applied does not say whether "other" is'),
        ({"samples": "many"}, 'a damaged Table 2: samples is "many": expected a whole number'),
        ({"samples": 10**400}, "a damaged Table 2: samples is a number of more than 60 digits"),
        ({"memory_limit": float("nan")}, "a damaged Table 2: memory_limit is nan: expected a whole number or null"),
        ({"table2": [{}]}, "a damaged Table 2: table2[0] has no applied"),
        ({"table2": []}, "Table 2 has no combination"),
        ({"device": "gpu"}, 'a damaged Table 2: device is "gpu": expected an object'),
        ({"schema_version": 2}, "upgrade memscope"),
    ],
)
def test_a_damaged_document_is_refused(damage: dict[str, Any], told: str) -> None:
    document = grid_document(grid(), [[], ["lora:r=8"]], [Path("a"), Path("b")], [])
    with pytest.raises(UsageError, match=re.escape(told)):
        grid_of(document | damage)
