"""Run several plans of one target in worker processes.

Measured runs take turns, each in a fresh process; simulations run in parallel.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from memscope.errors import MemscopeError, OutOfDeviceMemory, TargetError
from memscope.runs.processes import cores, interrupts_held, pool

if TYPE_CHECKING:
    from memscope.hooks.live_state import LiveState
    from memscope.strategies import Plan
    from memscope.workload.target import Target

__all__ = ["Report", "RunSpec", "check_plans", "run_all", "run_where_there_is_room", "try_all"]

T = TypeVar("T")

Report = Callable[[int, int, int, "LiveState | None"], None]
"""`report(run index, micro-batches done, total micro-batches, state)`; state is None if only the count is new."""
Message: TypeAlias = "tuple[int, int, int, LiveState | None]"
Messages: TypeAlias = "multiprocessing.Queue[Message]"
_POLL_SECONDS = 0.1


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
    live: bool = False
    """Whether to report the state of the run at every phase."""


def check_plans(target: Target, config: Any, plans: Sequence[Plan]) -> None:
    """Check the settings, the data and every plan before anything runs, on a model without memory (meta device).

    Raises:
        MemscopeError: the settings, the data or a plan cannot be used.
    """
    import torch

    from memscope.workload.building import usable

    with torch.device("meta"):
        try:
            built: object = target.build(config)
        except MemscopeError:
            raise
        except (Exception, SystemExit):  # possibly only on the meta device; the runs report real errors
            return
        workload = usable(built)
        for plan in plans:
            plan.check(workload)


def run_all(specs: Sequence[RunSpec], report: Report) -> None:
    """Run all specs, each writing a trace file. The first failure ends the other runs.

    Raises:
        MemscopeError: a run failed.
    """
    _carry_out(_run, specs, report)


def try_all(specs: Sequence[RunSpec], report: Report) -> list[str]:
    """Run all specs and return the error message of each; empty for a run that wrote its trace file.

    Raises:
        TargetError: a worker process was killed.
    """
    return _carry_out(_attempt, specs, report)


def run_where_there_is_room(specs: Sequence[RunSpec], report: Report) -> None:
    """Run all specs. A run whose weights alone do not fit writes no trace file; any other failure ends all runs.

    Raises:
        MemscopeError: a run failed.
    """
    _carry_out(_run_if_there_is_room, specs, report)


def _carry_out(work: Callable[[int, RunSpec], T], specs: Sequence[RunSpec], report: Report) -> list[T]:
    runs = list(enumerate(specs))
    if all(spec.simulated for spec in specs):
        return _side_by_side(work, runs, report)
    return [answer for run in runs for answer in _side_by_side(work, [run], report)]


def _side_by_side(work: Callable[[int, RunSpec], T], runs: Sequence[tuple[int, RunSpec]], report: Report) -> list[T]:
    messages: Messages = multiprocessing.get_context("spawn").Queue()
    with pool(min(len(runs), cores()), _report_to, messages) as workers:
        with interrupts_held():
            futures = [workers.submit(work, index, spec) for index, spec in runs]
        while not _finished(futures):
            for message in _waiting(messages):
                report(*message)
        for message in _waiting(messages):
            report(*message)
        return [future.result() for future in futures]


def _finished(futures: Sequence[Future[Any]]) -> bool:
    done, left = wait(futures, timeout=_POLL_SECONDS)
    for future in done:
        try:
            future.result()
        except BrokenProcessPool:
            raise TargetError(
                "the worker process of a run was killed, probably because the host ran out of memory"
            ) from None
    return not left


def _waiting(messages: Messages) -> Iterator[Message]:
    while True:
        try:
            yield messages.get_nowait()
        except Empty:
            return


_progress: Messages | None = None
"""The queue that a worker process reports to; set once in each worker."""


def _report_to(messages: Messages) -> None:
    global _progress
    _progress = messages


def _attempt(index: int, spec: RunSpec) -> str:
    try:
        _run(index, spec)
    except MemscopeError as error:
        return str(error)
    return ""


def _run_if_there_is_room(index: int, spec: RunSpec) -> None:
    with suppress(OutOfDeviceMemory):
        _run(index, spec)


def _run(index: int, spec: RunSpec) -> None:
    if spec.allocator is not None and not spec.simulated:  # PyTorch reads the variable once, when it is imported
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = spec.allocator
    import torch

    from memscope import record, simulate
    from memscope.allocator.settings import AllocatorSettings
    from memscope.simulation.devices.catalogue import get_device, load_devices
    from memscope.strategies import Plan
    from memscope.workload.building import usable
    from memscope.workload.description import Workload
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
        assert _progress is not None, "_report_to comes first"
        _progress.put((index, done, total, None))

    def told(state: LiveState) -> None:
        assert _progress is not None, "_report_to comes first"
        _progress.put((index, state.done, state.total, dataclasses.replace(state, capacity_bytes=capacity)))

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
        )
    else:
        capacity = spec.memory_bytes
        if capacity is None and spec.device == "cuda":
            capacity = torch.cuda.mem_get_info()[1]
        trace = record(build, device=spec.device, strategies=spec.plan, steps=spec.steps, progress=progress, live=live)
    command = {"target": spec.target, "preset": spec.preset, "settings": dict(spec.settings)}
    dataclasses.replace(trace, meta={**trace.meta, "command": command}).save(spec.path)
