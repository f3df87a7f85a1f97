"""Helpers of the browser tests: a run to show, and positions on its page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.effects import Run
from memscope.dashboards.demo import training_run
from memscope.dashboards.page import render_page
from memscope.simulation.device_memory import on_device
from memscope.simulation.devices.catalogue import get_device
from memscope.trace import Trace

__all__ = ["PLOT", "comes_to", "html_of", "on_a_device", "point_at", "run"]

PLOT = ".timeline .nsewdrag"
"""The area inside the axes. The first of each timeline is the stack, the second the phase bar."""


def run() -> Trace:
    """A run of 2 layers of 1 GiB in 2 parts; its peak is in the second micro-batch of step 1."""
    return training_run(layers=2, micro_batches=3, layer_bytes=2**30)


def on_a_device() -> Trace:
    """`run` on a device with an allocator and too little memory, so that its page has every part."""
    device = dataclasses.replace(get_device("gpu"), capacity_bytes=9 * 2**30, context_bytes=2**28)
    trace = on_device(run(), device, AllocatorSettings())
    return dataclasses.replace(trace, meta={**trace.meta, "flops": [10, 10]})


def html_of(*runs: Run | Trace, **more: Any) -> str:
    named = [run if isinstance(run, Run) else Run(f"run {index}", run) for index, run in enumerate(runs)]
    return render_page(named, **more)


def point_at(page: Any, trace: Trace, event: int) -> tuple[float, float]:
    """Position of an event in the first timeline, which must show the whole run."""
    box = page.locator(PLOT).first.bounding_box()
    return box["x"] + box["width"] * event / trace.events, box["y"] + 60


def comes_to(page: Any, look: Callable[[Any], Any], expected: Any) -> bool:
    """Whether `look` returns `expected` within five seconds. Playwright's own wait needs eval, which the page bans."""
    for _ in range(250):
        if look(page) == expected:
            return True
        page.wait_for_timeout(20)
    return False
