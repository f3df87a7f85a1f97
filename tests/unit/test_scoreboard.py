"""The scoreboard: its cases can be run as they are written, and its page shows the remembered results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from scoreboard_cases import ATTEMPTS, load_groups, models, remembered, requirements
from scoreboard_page import MEASURES, page

from memscope.analysis.fit import Fit
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies.plan import Plan
from memscope.workload.target import find_target

ROOT = Path(__file__).parents[2]
GROUPS = load_groups()
CASES = {case.id: case for group in GROUPS for case in group.cases}
RUNS = [(key, name) for key, case in CASES.items() for name in case.attempts]
TRUTH = ROOT.parent / "shared" / "truth"
"""The published figures, next to the project."""


def test_ids_are_unique_and_every_figure_has_a_source_and_a_known_measure() -> None:
    assert len(CASES) == sum(len(group.cases) for group in GROUPS)
    for case in CASES.values():
        assert case.source.startswith("https://github.com/")
        assert case.published
        assert case.published.keys() <= MEASURES.keys()
        assert bool(case.refused) != bool(case.attempts)


def test_environments_pin_every_package() -> None:
    used = {group.environment for group in GROUPS} - {"current"}
    assert used == requirements().keys()
    assert all("==" in package for packages in requirements().values() for package in packages)


@pytest.mark.parametrize(("key", "name"), RUNS)
def test_every_command_names_a_target_a_device_strategies_and_settings_that_exist(key: str, name: str) -> None:
    attempt = CASES[key].attempts[name]
    words = attempt.words
    pairs = words[words.index("--set") + 1 :]
    path = ROOT / attempt.target
    target = find_target(str(path) if path.exists() else attempt.target.partition(":")[0])
    target.configure(words=dict(pair.split("=", 1) for pair in pairs))
    get_device(attempt.device)
    Plan.parse(attempt.strategies)
    what = attempt.target.partition(":")[2]
    if what.startswith("build/"):
        assert Path(what).name in models()


def test_remembered_results_are_those_of_todays_commands() -> None:
    results = remembered()
    assert results.keys() == {key for key, case in CASES.items() if case.attempts}
    for key, name in RUNS:
        assert results[key][name]["command"] == " ".join(("memscope", *CASES[key].attempts[name].words))


def test_the_page_shows_the_remembered_results() -> None:
    written = (ROOT / "docs/scoreboard.md").read_text(encoding="utf-8")
    assert written == page(GROUPS, remembered()), "run: python benchmarks/scoreboard.py --page"


def test_an_attempt_without_a_result_is_told_not_left_out() -> None:
    group = next(group for group in GROUPS if len(group.cases) > 1 and not any(case.refused for case in group.cases))
    failed = {case.id: {name: {"command": "", "error": "no network"} for name in ATTEMPTS} for case in group.cases}
    assert "No prediction for any of these: no network." in page([group], failed)
    assert "not run yet" in page([group], {})


def test_reserved_memory_is_within_the_known_error_unless_the_figure_is_of_more_than_a_step() -> None:
    """No context is compared: PyTorch counts its own reserved bytes."""
    for key, case in CASES.items():
        peak = remembered().get(key, {}).get("read", {}).get("peak")
        if peak is None or "reserved" not in case.published or case.beyond:
            continue
        fit = Fit.of(peak["reserved"], peak["reserved"], case.published["reserved"])
        assert case.published["reserved"] <= fit.needed_bytes + fit.known_error_bytes, key


@pytest.mark.skipif(not TRUTH.is_dir(), reason=f"the published figures are not there: {TRUTH}")
def test_every_published_figure_is_on_the_board() -> None:
    files = [json.loads(file.read_text(encoding="utf-8")) for file in TRUTH.glob("*.json")]
    for row in (row for file in files for row in file):
        measure = "reserved" if "reserved" in row["metric"] else "allocated"
        published = CASES[row["id"]].published
        assert published[measure] == row["bytes"]
        if "nvidia_smi_peak_MiB" in row:
            assert published["device"] == row["nvidia_smi_peak_MiB"] * 2**20
