"""Importing a memory snapshot of 1 GB takes at most 90 seconds and 6 GiB.

The same run also measures PyTorch's own `torch.cuda._memory_viz trace_plot`, which makes its page from the same file.
Each runs in a process of its own, so that peak memory is measured separately. The snapshot has 110 MB, and results are
scaled. MEMSCOPE_SNAPSHOT_STEPS=440 makes one of 1 GB; PyTorch's viewer then requires a machine with 16 GB.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_allocator import training_run
from pytest_benchmark.fixture import BenchmarkFixture

from memscope.allocator.replay import replay

GB, GIB = 10**9, 2**30
MOST_SECONDS, MOST_BYTES = 90, 6 * GIB
"""Bounds for a snapshot of 1 GB."""
STEPS = int(os.environ.get("MEMSCOPE_SNAPSHOT_STEPS", "48"))
"""Number of steps in the run, 2.3 MB each."""
DEPTH = (20, 60)
"""Range of the number of frames in a stack: Python and C++ frames, from the model's code to the allocator."""

MEASURED = """
import json, resource, sys, time
{prepare}
began, worked = time.perf_counter(), time.process_time()
{run}
took = {{"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}}
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({{**took, "bytes": most, "found": found}}))
"""
OURS = MEASURED.format(
    prepare="from memscope.exchange.torch_reader import import_snapshot",
    run="found = len(import_snapshot(sys.argv[1]))",
)
THEIRS = MEASURED.format(
    prepare="import pickle; from torch.cuda._memory_viz import trace_plot",
    run="found = len(trace_plot(pickle.load(open(sys.argv[1], 'rb'))))",
)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a training run, with PyTorch's sharing: frames are shared objects, stacks are not."""
    path = tmp_path_factory.mktemp("import") / "snapshot.pickle"
    # In a process of its own, because the peak memory of this process would count for those it starts.
    subprocess.run([sys.executable, __file__, str(path)], check=True)
    return path


def made_up_snapshot() -> dict[str, Any]:
    chance = random.Random(7)
    frames = [
        {
            "name": f"function_{n}",
            "filename": f"/usr/lib/python3/site-packages/pkg/module_{n % 300}.py",
            "line": n % 1999,
        }
        for n in range(6000)
    ]
    stacks = [[chance.choice(frames) for _ in range(chance.randint(*DEPTH))] for _ in range(3000)]
    sizes, born, freed = training_run(steps=STEPS)
    run = replay(sizes, born, freed)
    of_event = {int(event): row for row, event in enumerate(born)}
    of_free = {int(event): row for row, event in enumerate(freed) if event >= 0}
    changes: dict[int, list[Any]] = {}
    for change in run.segment_events:
        changes.setdefault(change.event, []).append(change)
    entries: list[dict[str, Any]] = []

    def note(action: str, address: int, size: int, event: int, stack: list[Any]) -> None:
        about = {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 1_700_000_000_000_000 + event}
        entries.append({"frames": stack, **about, "compile_context": "N/A", "user_metadata": ""})

    for event in range(len(run.allocated)):
        for change in changes.get(event, ()):
            note(change.action, change.address, change.size_bytes, event, list(chance.choice(stacks)))
        row = of_event.get(event, of_free.get(event, -1))
        stack = list(chance.choice(stacks))
        for action in ("alloc",) if event in of_event else ("free_requested", "free_completed"):
            note(action, int(run.addresses[row]), int(sizes[row]), event, stack)
    last = len(run.allocated) - 1
    segments = [
        {
            "device": 0,
            "address": segment.address,
            "total_size": segment.size_bytes,
            "stream": 0,
            "segment_pool_id": (0, 0),
            "is_expandable": segment.expandable,
            "blocks": [
                {
                    "address": block.address,
                    "size": block.size_bytes,
                    "requested_size": block.requested_bytes,
                    "state": "active_allocated" if block.allocated else "inactive",
                    "frames": list(chance.choice(stacks)),
                }
                for block in segment.blocks
            ],
        }
        for segment in run.snapshots([last])[last].segments
    ]
    return {
        "segments": segments,
        "device_traces": [entries],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": ""},
        "external_annotations": [],
    }


def measured(script: str, path: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_snapshot_of_a_gigabyte_is_imported_in_90_seconds_and_6_gib(
    benchmark: BenchmarkFixture, snapshot: Path
) -> None:
    ours: dict[str, Any] = benchmark.pedantic(measured, args=(OURS, snapshot), rounds=1)  # type: ignore[no-untyped-call]
    theirs = measured(THEIRS, snapshot)
    size = snapshot.stat().st_size
    for_a_gb = {
        name: {key: round(GB / size * took[key], 1) for key in ("seconds", "cpu_seconds", "bytes")}
        for name, took in (("memscope", ours), ("memory_viz", theirs))
    }
    benchmark.extra_info.update(size_bytes=size, allocations=ours["found"], for_a_gigabyte=for_a_gb)
    # The import is one thread that never waits: its CPU time is its time on an otherwise idle machine.
    assert for_a_gb["memscope"]["cpu_seconds"] <= MOST_SECONDS, for_a_gb
    assert for_a_gb["memscope"]["bytes"] <= MOST_BYTES, for_a_gb
    assert for_a_gb["memscope"]["bytes"] <= for_a_gb["memory_viz"]["bytes"], for_a_gb


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(made_up_snapshot(), file)
