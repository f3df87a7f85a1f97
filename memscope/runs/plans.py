"""Run several plans of one target in worker processes.

Measured runs take turns, each in a fresh process; simulations run in parallel.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from memscope.errors import MemscopeError, OutOfDeviceMemory, TraceFileError
from memscope.runs.processes import cores, workers
from memscope.runs.worker import RunLost, tell
from memscope.trace import Trace

if TYPE_CHECKING:
    from memscope.hooks.live_state import LiveState
    from memscope.workload.description import Workload

__all__ = ["Ended", "Report", "RunSpec", "run_all", "run_where_there_is_room", "try_all"]

Report: TypeAlias = "Callable[[int, int, int, LiveState | None], None]"
"""`report(run index, micro-batches done, total micro-batches, state)`; state is None if only the count is new."""


@dataclass(frozen=True)
class RunSpec:
    """One run, described such that a fresh process can start it."""

    target: str
    preset: str | None
    settings: Mapping[str, str]
    plan: str
    """Strategies to apply."""
    compared: tuple[str, ...]
    """Every plan of the comparison: a strategy not applied here may change the baseline (`Strategy.baseline`)."""
    device: str
    device_file: Path | None
    """TOML file with more devices."""
    allocator: str | None
    """Settings of PyTorch's allocator, in the syntax of PYTORCH_CUDA_ALLOC_CONF; None: those of the environment."""
    simulated: bool
    steps: int
    path: Path
    """Path of the trace file to write; must not exist yet."""
    memory_bytes: int | None = None
    """Memory limit for PyTorch on a real GPU; None: no limit."""
    assume: str = ""
    """What a simulation takes for values that it cannot know, as `Assume.parse` reads it."""
    live: bool = False
    """Whether to report the state of the run at every phase."""
    timeout_seconds: float | None = None
    """Longest time of the run; None: no limit."""


@dataclass(frozen=True)
class Ended:
    """How runs ended, by their indices."""

    traced: Mapping[int, Trace | None]
    """The runs that succeeded: None for a trace that is in its file, else the trace, whose file cannot be written."""
    failed: Mapping[int, MemscopeError]
    """The runs that failed. A run that is in neither was ended with the others."""


def run_all(specs: Sequence[RunSpec], report: Report) -> Ended:
    """Run all specs, each writing a trace file. An error of the target's code ends the other runs.

    A run that is lost (`RunLost`) says nothing about the others: they go on.
    """
    return _carried_out(specs, report, lambda error: not isinstance(error, RunLost))


def try_all(specs: Sequence[RunSpec], report: Report) -> list[str]:
    """Run all specs and return the error message of each; empty for a run that wrote its trace file."""
    ended = _carried_out(specs, report, lambda error: False)
    unsaved = "its trace cannot be written: free some space"
    saved = {index: "" if trace is None else unsaved for index, trace in ended.traced.items()}
    return [str(ended.failed[index]) if index in ended.failed else saved[index] for index in range(len(specs))]


def run_where_there_is_room(specs: Sequence[RunSpec], report: Report) -> Ended:
    """Run all specs, as `run_all`; a run whose weights do not fit on the device (`OutOfDeviceMemory`) ends no other."""
    return _carried_out(specs, report, lambda error: not isinstance(error, (RunLost, OutOfDeviceMemory)))


def _carried_out(specs: Sequence[RunSpec], report: Report, is_last: Callable[[MemscopeError], bool]) -> Ended:
    traced: dict[int, Trace | None] = {}
    failed: dict[int, MemscopeError] = {}
    for index, answer in _answers(specs, report):
        if not isinstance(answer, MemscopeError):
            traced[index] = answer
            continue
        failed[index] = answer
        if is_last(answer):
            break
    return Ended(traced, failed)


def _answers(specs: Sequence[RunSpec], report: Report) -> Iterator[tuple[int, Trace | MemscopeError | None]]:
    runs = list(enumerate(specs))
    turns = [runs] if all(spec.simulated for spec in specs) else [[run] for run in runs]
    for turn in turns:
        with workers(min(len(turn), cores()), timeout_seconds=specs[0].timeout_seconds) as team:
            for place, answer in team.answers(_run, turn, lambda message: report(*message)):
                yield turn[place][0], answer


def _run(index: int, spec: RunSpec) -> Trace | None:
    """Carry out a run in a worker process; return the trace only if it cannot be saved."""
    if spec.allocator is not None and not spec.simulated:  # PyTorch reads the variable once, when it is imported
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = spec.allocator
    import torch

    from memscope import record, simulate
    from memscope.allocator.settings import AllocatorSettings
    from memscope.simulation.devices.catalogue import get_device, load_devices
    from memscope.strategies import Plan
    from memscope.workload.building import usable
    from memscope.workload.target import find_target

    torch.set_num_threads(1 if spec.simulated else cores())
    if spec.memory_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(spec.memory_bytes / torch.cuda.mem_get_info()[1])

    def build() -> Workload:
        target = find_target(spec.target)
        workload = usable(target.build(target.configure(spec.preset, spec.settings)))
        applied = {strategy.name for strategy in Plan.parse(spec.plan).strategies}
        for other in spec.compared:
            Plan.parse(other).prepare_baseline(workload, applied)
        return workload

    def progress(done: int, total: int) -> None:
        tell((index, done, total, None))

    def told(state: LiveState) -> None:
        tell((index, state.done, state.total, dataclasses.replace(state, capacity_bytes=capacity)))

    live = told if spec.live else None
    if spec.simulated:
        device = get_device(spec.device, load_devices(spec.device_file) if spec.device_file else None)
        allocator = None if spec.allocator is None else AllocatorSettings.parse(spec.allocator)
        capacity = device.allocatable_bytes
        trace = simulate(
            build,
            device=device,
            strategies=spec.plan,
            steps=spec.steps,
            allocator=allocator,
            progress=progress,
            live=live,
            assume=spec.assume,
        )
    else:
        capacity = spec.memory_bytes
        if capacity is None and spec.device == "cuda":
            capacity = torch.cuda.mem_get_info()[1]
        trace = record(build, device=spec.device, strategies=spec.plan, steps=spec.steps, progress=progress, live=live)
    command = {"target": spec.target, "preset": spec.preset, "settings": dict(spec.settings)}
    trace = dataclasses.replace(trace, meta={**trace.meta, "command": command})
    try:
        trace.save(spec.path)
    except TraceFileError:
        return trace
    return None
