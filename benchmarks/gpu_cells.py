"""The jobs of `make gpu` for one cell, each in a process of its own.

As a program, this module reads a job from standard input, as one line of JSON, runs it, and writes the result to a
file. It completes all slow imports before it reads the job, so that a process can start ahead of its turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gpu_advice import advise, measure_plan
from gpu_finetune import finetune, finetune_with_peft
from gpu_plan import TrainingCell
from gpu_report import compare_sequences, imitated, write_history
from gpu_table2 import measure_combination, predict_combination
from gpu_training import materialized, prepare, start


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """Return the machine's versions and GPU."""
    import platform

    import torch

    found = {"versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}}
    if not torch.cuda.is_available():
        return {**found, "device": {"name": "CPU"}}
    known = torch.cuda.get_device_properties(0)
    device = {"name": known.name, "total_memory": known.total_memory, "capability": [known.major, known.minor]}
    return {**found, "device": {**device, "multiprocessors": known.multi_processor_count}}


def predict(job: dict[str, Any]) -> dict[str, Any]:
    """Simulate two steps, and save the trace for `compare`."""
    import torch

    from memscope import simulate

    if job["device"] == "cuda":
        os.nice(10)  # measurements that run meanwhile take precedence
    torch.set_num_threads(1)
    cell, began = TrainingCell(**job["cell"]), time.perf_counter()
    trace = simulate(lambda: prepare(cell, job["preset"]), device=job["predicted_for"], strategies=cell.plan, steps=2)
    seconds = time.perf_counter() - began
    trace.save(job["trace"])
    requested = dataclasses.replace(trace, size=trace.requested).peak.allocated_bytes
    return {
        "allocated": trace.peak.allocated_bytes,
        "reserved": int(trace.meta["peak_reserved"]),
        "requested": requested,
        "peak": trace.peak._asdict(),
        "by_category": {name: size for name, size in trace.by_category().items() if size},
        "out_of_memory": trace.meta.get("out_of_memory"),
        "estimated_workspaces": trace.meta.get("estimated_workspaces"),
        "seconds": seconds,
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run two steps with the allocator's history, then one timed step."""
    cell = TrainingCell(**job["cell"])
    result, entries = (_on_gpu if job["device"] == "cuda" else _in_place_of_a_gpu)(cell, job["preset"])
    write_history(Path(job["history"]), entries, job["about"] | {"cell": cell.name, "measured": result})
    return result


def _on_gpu(cell: TrainingCell, preset: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    import torch

    from memscope.workload.step import run_step

    torch.cuda.memory._record_memory_history(enabled="all", context=None)
    training = ran_out = None
    try:
        training, pieces = start(materialized(cell, preset, "cuda", cell.plan), "cuda", steps=3)
        for _ in range(2):
            run_step(training, pieces.pop(0))
    except torch.OutOfMemoryError as error:
        ran_out = str(error).splitlines()[0]
    torch.cuda.synchronize()
    stats, (free, total) = torch.cuda.memory_stats(), torch.cuda.mem_get_info()
    entries = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    result: dict[str, Any] = {
        name: stats[f"{name}_bytes.all.peak"] for name in ("allocated", "reserved", "requested", "active")
    }
    result |= {"device_used": total - free, "reserved_now": stats["reserved_bytes.all.current"]}
    result |= {"retries": stats["num_alloc_retries"], "out_of_memory": ran_out, "seconds": None}
    if ran_out is None and training is not None:
        began = time.perf_counter()
        run_step(training, pieces.pop(0))
        torch.cuda.synchronize()
        result["seconds"] = time.perf_counter() - began
        result["scale"] = training.scaler.get_scale() if training.scaler else None
    return result, entries


def _in_place_of_a_gpu(cell: TrainingCell, preset: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from memscope import record

    trace = record(materialized(cell, preset, "cpu", ""), strategies=cell.plan, steps=3)
    peaks, entries = imitated(trace)
    return peaks | {"seconds": trace.meta["seconds"][-1], "out_of_memory": None}, entries


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """Replay the measured history, and compare it with the simulated trace if one exists."""
    from memscope.allocator.history import first_difference, read_history
    from memscope.allocator.replay import replay
    from memscope.allocator.settings import AllocatorSettings
    from memscope.trace import Trace

    with np.load(job["history"], allow_pickle=False) as file:
        about, rows = json.loads(str(file["about"])), file["trace_0"].tolist()
    history = read_history(
        {"action": about["actions"][action], "addr": addr, "size": size, "stream": stream}
        for action, addr, size, stream in rows
    )
    done = replay(
        history.sizes,
        history.born,
        history.freed,
        streams=history.streams,
        settings=AllocatorSettings.parse(about["cases"][0]["settings"]),
        cache_emptied=history.given_back,
        segment_addresses=history.segment_addresses if about["driver_addresses"] else None,
    )
    found, real = first_difference(history, done), about["measured"]
    peaks = {"allocated": done.peak_allocated, "reserved": done.peak_reserved, "requested": int(done.requested.max())}
    wrong = [f"{name} {peaks[name]} for {real[name]}" for name in peaks if peaks[name] != real[name]]
    difference = found or (f"peaks: {', '.join(wrong)}" if wrong else None)
    result: dict[str, Any] = {"replay": {"exact": difference is None, "first_difference": difference, **peaks}}
    if Path(job["trace"]).exists():
        result["comparison"] = compare_sequences(history, done, Trace.load(job["trace"]))
    return result


def overhead(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the time of a step under one recorder."""
    from memscope.workload.step import run_step

    cell, device, steps = TrainingCell(**job["cell"]), job["device"], job["steps"]
    if job["by"] == "memscope":
        return _under_memscope(cell, job["preset"], device, steps)
    if job["by"] == "_record_memory_history" and device != "cuda":
        return {"unavailable": "not available: requires CUDA"}
    if job["by"] == "_record_memory_history":
        import torch

        torch.cuda.memory._record_memory_history(enabled="all", context=None)
    training, pieces = start(materialized(cell, job["preset"], device, cell.plan), device, steps)
    marks: list[float] = []
    scope: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    observer = None
    if job["by"] == "MemTracker":
        from torch.distributed._tools.mem_tracker import MemTracker

        scope = tracker = MemTracker()
        observer = _Reset(tracker)
        tracker.track_external(training.workload.model, training.optimizer)
    with scope:
        while pieces:
            marks.append(_now(device))
            run_step(training, pieces.pop(0), observer)
        marks.append(_now(device))
    return _steady(marks)


class _Reset:
    """Resets MemTracker before each forward pass, since it follows only one."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def phase(self, name: str, micro_batch: int) -> None:
        if name == "forward":
            self._tracker.reset_mod_stats()

    def inputs(self, data: Any) -> None:
        pass


def _under_memscope(cell: TrainingCell, preset: str, device: str, steps: int) -> dict[str, Any]:
    import torch

    from memscope import record

    marks: list[float] = []

    def progress(done: int, total: int) -> None:
        if done % cell.accumulation == 0:
            marks.append(_now(device))

    trace = record(
        lambda: materialized(cell, preset, device, ""),
        device=device,
        strategies=cell.plan,
        steps=steps,
        progress=progress,
    )
    sizes = {"allocated": trace.peak.allocated_bytes, "by_category": trace.by_category()}
    real = {"max_memory_allocated": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    *steps_done, end = marks  # the last mark follows the recorder's reading of the history
    return _steady(steps_done) | {"last_step_and_closing": end - steps_done[-1], "trace": sizes | real}


def _now(device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _steady(marks: list[float]) -> dict[str, Any]:
    seconds = np.diff(marks).tolist()
    return {"seconds": seconds, "median": median(seconds[3:] or seconds)}


_OF_SECTIONS = (advise, measure_plan, measure_combination, predict_combination, finetune, finetune_with_peft)
JOBS = {job.__name__: job for job in (probe, predict, measure, compare, overhead, *_OF_SECTIONS)}


def main() -> None:
    """Run one job; if it fails, its result is the error."""
    import torch

    import memscope.hooks.record
    import memscope.simulation.simulate
    import memscope.workload.target  # noqa: F401

    job = json.loads(sys.stdin.readline())
    if job.get("device") == "cpu":
        torch.set_num_threads(1)  # in a dry run, several processes share few cores
    try:
        result = JOBS[job["kind"]](job)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    path = Path(job["result"])
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
