from __future__ import annotations

import importlib
import sys

import pytest

MOVED = {
    "memscope.diff": ("memscope.analysis.diff", "diff"),
    "memscope.grid": ("memscope.analysis.grid", "Grid"),
    "memscope.live": ("memscope.hooks.live_state", "LiveState"),
    "memscope.simulation.cost": ("memscope.analysis.cost", "step_seconds"),
    "memscope.strategies.layer_plan": ("memscope.strategies.ckpt.layer_plan", "LayerPlan"),
}
"""Paths that the documentation of 0.1 named → module and name today."""


@pytest.mark.parametrize("old", MOVED)
def test_a_documented_path_still_imports_and_warns_of_the_new_one(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    new, name = MOVED[old]
    with pytest.warns(DeprecationWarning, match=f"{old} has moved: import {new}"):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
    assert importlib.import_module(new).__name__ == new


def test_an_unknown_module_is_still_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"memscope\.dif"):
        importlib.import_module("memscope.dif")
