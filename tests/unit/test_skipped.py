"""Optimizer steps skipped by a gradient scaler are reported: a measured run then lacks optimizer state."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from memscope import Trace, Workload, record
from memscope.analysis.effects import Run, Table1
from memscope.analysis.skipped import how_skipped
from memscope.cli.report_tables import comparison_sections, print_sections


def recorded(factor: float, steps: int) -> Trace:
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
    trace = recorded(factor, steps=2)
    assert trace.meta.get("skipped_steps", 0) == left_out
    assert (trace.max_by_category()["optimizer_state"] > 0) == (left_out < 2)
    told = f"skipped {left_out} of 2 optimizer steps"
    assert (told in how_skipped(trace)) == (told in shown(trace)) == (left_out > 0)
