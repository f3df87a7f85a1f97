"""The part of `make gpu` that measures and predicts Table 2: every combination of strategies.

It does the same as `memscope profile targets/llama2 --grid ga,amp,lora --device cuda`, with two differences: weights
are initialized on the GPU, because the host is slow, and the samples have the lengths in `STEP`, those of real data.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from gpu_plan import Budget, TrainingCell

from memscope.units import format_bytes, parse_bytes

__all__ = ["BOUND", "CARD", "GRID", "Table2", "measure_combination", "predict_combination", "table2_lines"]

GRID = "ga,amp,lora"
CARD = "40GB"
"""Memory limit of the second Table 2."""
SAMPLES = 200
BOUND = 0.005
"""Largest accepted relative error of a predicted peak."""
_PLAIN = TrainingCell(weights="fp32", amp="none", training="full", ckpt="none", accumulation=8, attention="eager")


class Runs(Protocol):
    """Runs jobs, each in a process of its own."""

    def do(self, kind: str, **job: Any) -> dict[str, Any]:
        """Run a job in parallel to other jobs."""

    def do_next(self, kind: str, **job: Any) -> dict[str, Any]:
        """Run a job in the process that is ready."""


class Table2:
    """Every combination of a grid, with its results so far."""

    def __init__(self, grid: str, memory: str | None, common: dict[str, Any]) -> None:
        self._memory_bytes = None if memory is None else parse_bytes(memory)
        self._common = {"grid": grid, "memory_bytes": self._memory_bytes, **common}
        factors = grid.split(",")
        choices = list(itertools.product((False, True), repeat=len(factors)))
        self._plans = [",".join(itertools.compress(factors, applied)) for applied in choices]
        self._applied = dict(zip(self._plans, choices, strict=True))
        self._predicted: dict[str, Future[dict[str, Any]]] = {}
        self._measured: dict[str, dict[str, Any]] = {}

    def _job(self, plan: str) -> dict[str, Any]:
        return {"plan": plan, "applied": self._applied[plan], **self._common}

    def predict(self, runs: Runs, pool: ThreadPoolExecutor, device: str) -> None:
        """Start to simulate every combination."""
        for plan in self._plans:
            job = {**self._job(plan), "predicted_for": device}
            self._predicted[plan] = pool.submit(runs.do, "predict_combination", **job)

    def measure(self, runs: Runs, budget: Budget, guess_seconds: float) -> None:
        """Measure one combination after the other while time allows."""
        taken: list[float] = []
        for plan in self._plans:
            if not budget.allows(taken, guess_seconds):
                return
            began = budget.spent
            self._measured[plan] = runs.do_next("measure_combination", **self._job(plan))
            taken.append(budget.spent - began)

    def wait(self) -> None:
        """Wait until no combination is being simulated."""
        for future in self._predicted.values():
            future.exception()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each combination with its results so far, without waiting for any."""
        for plan in self._plans:
            row: dict[str, Any] = {"strategies": plan, "memory_limit": self._memory_bytes}
            measured = self._measured.get(plan, {"error": "skipped: no time left"})
            future = self._predicted.get(plan)
            done = future is not None and future.done() and not future.cancelled()
            predicted = future.result() if future is not None and done else {"error": "not predicted"}
            for side, found in (("measured", measured), ("predicted", predicted)):
                row |= {side: found} if "error" not in found else {f"{side}_problem": found["error"]}
            yield row


def _workload(job: dict[str, Any]) -> Any:
    """The workload of a combination before its strategies, prepared like those of `--grid` for comparability."""
    from gpu_training import prepare

    from memscope.strategies import Plan

    workload = prepare(_PLAIN, job["preset"])
    applied = {strategy.name for strategy in Plan.parse(job["plan"]).strategies}
    Plan.parse(job["grid"]).prepare_baseline(workload, applied)
    return workload


def measure_combination(job: dict[str, Any]) -> dict[str, Any]:
    """Record two steps, and return their cell of Table 2."""
    from functools import partial

    import torch
    from gpu_training import on_device

    from memscope import record
    from memscope.strategies import Plan

    # At the default scale, the first gradients may overflow. The optimizer, whose state is part of the peak, would then
    # not step.
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=1.0)  # type: ignore[misc, assignment]
    if job["memory_bytes"] is not None and job["device"] == "cuda":
        total_bytes = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(job["memory_bytes"] / total_bytes)
    with torch.device("meta"):
        workload = _workload(job)
        Plan.parse(job["plan"]).apply(workload)
    try:
        on_device(workload, job["device"])
    except torch.OutOfMemoryError:
        return _cell(job, None)
    return _cell(job, record(workload, device=job["device"], steps=2))


def predict_combination(job: dict[str, Any]) -> dict[str, Any]:
    """Simulate the same two steps, and return their cell of Table 2."""
    import dataclasses

    import torch

    from memscope import simulate
    from memscope.simulation.devices.catalogue import get_device

    if job["device"] == "cuda":
        os.nice(10)  # measurements that run meanwhile take precedence
    torch.set_num_threads(1)
    device = get_device(job["predicted_for"])
    if job["memory_bytes"] is not None:
        # The limit applies to PyTorch's allocator, which does not count the CUDA context.
        device = dataclasses.replace(device, capacity_bytes=job["memory_bytes"] + device.context_bytes)
    return _cell(job, simulate(lambda: _workload(job), device=device, strategies=job["plan"], steps=2))


def _cell(job: dict[str, Any], trace: Any) -> dict[str, Any]:
    """The cell of Table 2 for one run; `trace` is None if the weights did not fit."""
    from dataclasses import asdict

    from memscope.analysis.grid import Cell, table2
    from memscope.strategies import read_strategies

    applied = tuple(job["applied"])
    if trace is None:
        return asdict(Cell(applied, fits=False, allocated_bytes=None, reserved_bytes=None, seconds=None))
    grid = table2(read_strategies(job["grid"]), [(applied, trace)], SAMPLES, job["memory_bytes"])
    optimizer_state = trace.by_category()["optimizer_state"]
    (samples,) = grid.samples_per_step
    return asdict(grid.cells[0]) | {"steps": grid.steps(samples), "optimizer_state_bytes": optimizer_state}


def table2_lines(rows: list[dict[str, Any]], predicted_for: str) -> list[str]:
    """Return lines of Markdown: each combination, measured and predicted, and whether the bound holds."""
    if not rows:
        return []
    lines = [
        "",
        f"Table 2: seconds are those of {SAMPLES} samples, with each step as long as the second one. Predicted for "
        f"{predicted_for}; predicted times are estimates. × runs out of memory.",
        "",
        "| memory | strategies | allocated MiB | predicted | off | reserved MiB | predicted | off | s | estimated |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *map(_line, rows),
        "",
    ]
    errors = [_off(row, name) for row in rows for name in ("allocated_bytes", "reserved_bytes")]
    known = [abs(error) for error in errors if error is not None]
    if known:
        held = "held" if max(known) <= BOUND else "not held"
        lines.append(f"Peaks of Table 2: worst {max(known):.3%} off, bound {BOUND:.1%}: {held}.")
    wrong = [row for row in rows if len(_sides(row)) == 2 and len({side["fits"] for side in _sides(row)}) == 2]
    if wrong:
        named = ", ".join(f"{row['strategies'] or 'none'} in {_memory(row)}" for row in wrong)
        lines.append(f"Wrong predictions of whether a combination fits: {named}.")
    return lines


def _sides(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row[side] for side in ("measured", "predicted") if side in row]


def _line(row: dict[str, Any]) -> str:
    words = [_memory(row), row["strategies"] or "none"]
    for name in ("allocated_bytes", "reserved_bytes"):
        error = _off(row, name)
        words += [_size(row, "measured", name), _size(row, "predicted", name)]
        words.append("" if error is None else f"{error:+.3%}")
    for side in ("measured", "predicted"):
        seconds = row.get(side, {}).get("seconds")
        words.append("" if seconds is None else f"{seconds:.1f}")
    return "| " + " | ".join(word.replace("|", "/") for word in words) + " |"


def _memory(row: dict[str, Any]) -> str:
    return "all" if row["memory_limit"] is None else format_bytes(row["memory_limit"])


def _size(row: dict[str, Any], side: str, name: str) -> str:
    if side not in row:
        return str(row[f"{side}_problem"]) if name == "allocated_bytes" else ""
    size = row[side][name]
    shown = "" if size is None else f"{size / 2**20:.2f}"
    return shown if row[side]["fits"] else f"× {shown}".rstrip()


def _off(row: dict[str, Any], name: str) -> float | None:
    """Relative error of the prediction; None unless both runs completed."""
    sides = _sides(row)
    if len(sides) < 2 or not all(side["fits"] and side[name] is not None for side in sides):
        return None
    real, guess = (side[name] for side in sides)
    return float((guess - real) / real)
