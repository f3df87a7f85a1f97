"""`make soak`: five runs of the suite in orders of their own, the last two beside busy processes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import run_soak


class Busy:
    """Stands for the processes that keep the cores busy."""

    alive = 0

    def __init__(self, *_: object) -> None:
        Busy.alive += 1

    def kill(self) -> None:
        Busy.alive -= 1

    def wait(self) -> None: ...


@pytest.mark.parametrize(("fails_at", "expected"), [(None, [0, 0, 0, 2, 2]), (1, [0, 0]), (4, [0, 0, 0, 2, 2])])
def test_the_runs_stop_at_the_first_that_fails(
    fails_at: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    busy, seeds = [], []

    def run(command: list[str], check: bool) -> Any:
        busy.append(Busy.alive)
        seeds.append(next(word for word in command if word.startswith("--random-order-seed=")))
        return SimpleNamespace(returncode=3 if len(busy) - 1 == fails_at else 0)

    monkeypatch.setattr(run_soak, "subprocess", SimpleNamespace(run=run, Popen=Busy))
    monkeypatch.setattr(run_soak, "cores", lambda: 2)
    assert run_soak.main(["--seed", "40"]) == (0 if fails_at is None else 3)
    assert busy == expected
    assert seeds == [f"--random-order-seed={40 + number}" for number in range(len(expected))]
    assert Busy.alive == 0
    if fails_at is not None:
        assert f"SEED={40 + fails_at}" in capfd.readouterr().err
