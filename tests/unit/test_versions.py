"""The versions in a trace: those of libraries that decide sizes; and the note on a PyTorch that was not tested."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from memscope import Workload, record, simulate
from memscope.analysis.diff import diff
from memscope.hooks import versions as module
from memscope.hooks.versions import NEWEST_TESTED_TORCH


def build():
    return Workload(
        model=nn.Linear(8, 8),
        batches=[torch.ones(4, 8)],
        loss=lambda model, x: model(x).mean(),
        optimizer_factory=torch.optim.AdamW,
    )


def library(monkeypatch, name, version):
    found = ModuleType(name)
    found.__version__ = version
    monkeypatch.setitem(sys.modules, name, found)


@pytest.mark.parametrize("run", [simulate, record])
def test_a_trace_names_the_versions_of_libraries_that_were_imported(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    library(monkeypatch, "transformers", "5.1.0")
    library(monkeypatch, "bitsandbytes", "0.50.2")
    found = run(build).meta["versions"]
    assert found["torch"] == torch.__version__
    assert (found["transformers"], found["bitsandbytes"]) == ("5.1.0", "0.50.2")
    assert "peft" not in found


def test_a_difference_names_the_versions_that_differ(monkeypatch):
    library(monkeypatch, "transformers", "5.1.0")
    monkeypatch.delitem(sys.modules, "peft", raising=False)  # another test of this process may have imported it
    before = simulate(build)
    library(monkeypatch, "transformers", "5.2.0")
    library(monkeypatch, "peft", "0.21.0")
    after = simulate(build)
    assert [(s.name, s.before, s.after) for s in diff(before, after).settings] == [
        ("versions: transformers", "5.1.0", "5.2.0"),
        ("versions: peft", None, "0.21.0"),
    ]


@pytest.mark.parametrize("run", [simulate, record])
def test_a_pytorch_newer_than_the_newest_tested_one_is_noted_once(run, monkeypatch):
    monkeypatch.setattr(module, "NEWEST_TESTED_TORCH", (2, 5))
    (note,) = run(build).meta["notes"]
    assert f"PyTorch {torch.__version__} is newer than 2.5" in note


def test_the_tested_pytorch_needs_no_note():
    installed = tuple(map(int, torch.__version__.split(".")[:2]))
    assert installed <= NEWEST_TESTED_TORCH, "run the suite, repair what breaks, and raise NEWEST_TESTED_TORCH"
    assert "notes" not in simulate(build).meta
