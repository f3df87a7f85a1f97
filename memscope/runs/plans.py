"""Run several plans of one target in processes of their own.

Each measured run gets a fresh process; simulations run side by side.
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
"""`report(index of the run, micro-batches done, in all, state)`; the state is None where only the count is new."""
Message: TypeAlias = "tuple[int, int, int, LiveState | None]"
Messages: TypeAlias = "multiprocessing.Queue[Message]"
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class RunSpec:
    """One run, as text that a fresh process can start from."""

    target: str
    preset: str | None
    settings: Mapping[str, str]
    plan: str
    """Strategies to apply."""
    compared: tuple[str, ...]
    """Every plan of the comparison: a strategy not applied here may ask for a fair baseline (`Strategy.baseline`)."""
    device: str
    device_file: Path | None
    """TOML file with more devices."""
    allocator: str | None
    """Settings of PyTorch's allocator, as PYTORCH_CUDA_ALLOC_CONF has them; None: those of the environment."""
    simulated: bool
    steps: int
    path: Path
    """Where the trace goes; must not exist yet."""
    memory_bytes: int | None = None
    """Most that PyTorch may take of a real GPU; None: all of it."""
    live: bool = False
    """Tell the state of the run at every phase."""


def check_plans(target: Target, config: Any, plans: Sequence[Plan]) -> None:
    """Find what is wrong with the settings, the data and every plan before anything runs, on a model without memory.

    Raises:
        MemscopeError: what is wrong.
    """
    import torch

    from memscope.workload.building import usable

    with torch.device("meta"):
        try:
            built: object = target.build(config)
        except MemscopeError:
            raise
        except (Exception, SystemExit):  # the runs will tell; this model may only be unable to live on the meta device
            return
        workload = usable(built)
        for plan in plans:
            plan.check(workload)


def run_all(specs: Sequence[RunSpec], report: Report) -> None:
    """Carry out every run and leave a trace file for each. The first failure ends the others.

    Raises:
        MemscopeError: what a run failed with.
    """
    _carry_out(_run, specs, report)


def try_all(specs: Sequence[RunSpec], report: Report) -> list[str]:
    """Carry out every run: what each failed with, empty where it left its trace file.

    Raises:
        TargetError: when a process was killed.
    """
    return _carry_out(_attempt, specs, report)


def run_where_there_is_room(specs: Sequence[RunSpec], report: Report) -> None:
    """Carry out every run. One whose weights alone do not fit leaves no trace file; any other failure ends all.

    Raises:
        MemscopeError: what a run failed with.
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
                "a run ended without a word: its process was killed, most likely for want of host memory"
            ) from None
    return not left


def _waiting(messages: Messages) -> Iterator[Message]:
    while True:
        try:
            yield messages.get_nowait()
        except Empty:
            return


_progress: Messages | None = None
"""Where a process of a run reports to; set once in each."""


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
    if spec.allocator is not None and not spec.simulated:  # PyTorch reads it once, when it is loaded
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
