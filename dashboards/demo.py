"""A small made-up training run, for demonstrations and for tests that need a trace but no model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from memscope.analysis.effects import Run
from memscope.dashboards.page import render_page
from memscope.trace import CATEGORIES, MARK_COLUMNS, PHASES, Category, Phase, Trace, columns_of

__all__ = ["training_run", "write_page"]

_MIB = 2**20


class _MadeUpRun:
    """The rows and marks of a made-up run while it grows."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.marks: list[tuple[int, int, int, int]] = []
        self.modules, self.ops = ["(model)"], ["aten.empty"]
        self.events, self.now = 0, (0, -1, 0)

    def phase(self, name: Phase, step: int, micro_batch: int) -> None:
        self.now = (PHASES.index(name), step, micro_batch)
        self.marks.append((self.events, *self.now))

    def take(self, category: Category, size_bytes: int, module: str, op: str = "aten.empty") -> int:
        for table, name in ((self.modules, module), (self.ops, op)):
            if name not in table:
                table.append(name)
        codes = CATEGORIES.index(category), self.modules.index(module), self.ops.index(op)
        self.rows.append([size_bytes, *codes, *self.now, self.events, -1])
        self.events += 1
        return len(self.rows) - 1

    def free(self, row: int) -> None:
        self.rows[row][-1] = self.events
        self.events += 1


def training_run(
    *,
    layers: int = 16,
    steps: int = 2,
    micro_batches: int = 2,
    layer_bytes: int = 256 * _MIB,
    target: str = "made-up model",
) -> Trace:
    """A transformer-like run: each layer has parameters, gradients and, from the end of step 0 on, AdamW state.

    Args:
        layers: number of layers.
        steps: optimizer steps.
        micro_batches: forward and backward passes in each step.
        layer_bytes: size of one layer's parameters; activations and optimizer state are in proportion.
        target: name of the target in the trace's metadata.
    """
    run = _MadeUpRun()
    names = [f"layers.{i}.{part}" for i in range(layers) for part in ("attention", "feed_forward")]
    run.phase("setup", -1, 0)
    for name in names:
        run.take("parameter", layer_bytes // 2, name)
    state_there = False
    for step in range(steps):
        gradients: list[int] = []
        for micro_batch in range(micro_batches):
            _forward_backward(run, names, step, micro_batch, layer_bytes, gradients)
        run.phase("optimizer", step, micro_batches - 1)
        for name in names:
            if not state_there:
                run.take("optimizer_state", layer_bytes, name, "aten.zeros_like")
            run.free(run.take("temporary", layer_bytes // 2, name, "aten._foreach_sqrt"))
        state_there = True
        run.phase("zero_grad", step, micro_batches - 1)
        for row in gradients:
            run.free(row)
    return _as_trace(run, target)


def _forward_backward(
    run: _MadeUpRun, names: list[str], step: int, micro_batch: int, layer_bytes: int, gradients: list[int]
) -> None:
    run.phase("forward", step, micro_batch)
    inputs = run.take("input", layer_bytes // 4096, "(model)")
    saved: list[list[int]] = []
    for name in names:
        scratch = run.take("temporary", layer_bytes // 8, name, "aten.mul")
        saved.append([run.take("activation", layer_bytes // 12, name, "aten.mm") for _ in range(3)])
        run.free(scratch)
    run.phase("loss", step, micro_batch)
    logits = run.take("activation", layer_bytes // 2, "output", "aten._log_softmax")
    run.phase("backward", step, micro_batch)
    workspace = run.take("workspace", 8_519_680, "output", "aten.mm")
    run.free(logits)
    for name, rows in zip(reversed(names), reversed(saved), strict=True):
        gradient = run.take("temporary" if micro_batch else "gradient", layer_bytes // 2, name, "aten.mm")
        for row in reversed(rows):
            run.free(row)
        if micro_batch:
            run.free(gradient)
        else:
            gradients.append(gradient)
    run.free(workspace)
    run.free(inputs)


def _as_trace(run: _MadeUpRun, target: str) -> Trace:
    names = ("size", "category", "module", "op", "phase", "step", "micro_batch", "born", "freed")
    rows = columns_of(names, run.rows)
    return Trace(
        **rows, requested=rows["size"], **columns_of(MARK_COLUMNS, run.marks),
        modules=tuple(run.modules), ops=tuple(run.ops),
        meta={
            "target": target, "strategies": ["ga:steps=2"], "device": {"name": "made-up GPU", "simulated": True},
            "versions": {"torch": "none"},
        },
    )  # fmt: skip


def write_page(arguments: Sequence[str]) -> None:
    """Write `memscope-page.html` into the current folder, from the named trace files, or from a made-up run.

    Raises:
        FileExistsError: when the page exists already.
        TraceFileError: when a file is not a trace.
    """
    runs = [Run(Path(name).stem, Trace.load(name)) for name in arguments] or [Run("made-up", training_run())]
    with open("memscope-page.html", "x", encoding="utf-8") as file:
        file.write(render_page(runs))
    print("memscope-page.html written: open it in a browser")


if __name__ == "__main__":
    write_page(sys.argv[1:])
