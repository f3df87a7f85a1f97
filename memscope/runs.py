"""Run several plans of one target in processes of their own.

Each measured run gets a fresh process; simulations run side by side.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, TypeAlias

from memscope.errors import MemscopeError, TargetError

if TYPE_CHECKING:
    from memscope.strategies import Plan
    from memscope.target import Target

__all__ = ["RunSpec", "check_plans", "run_all"]

Report = Callable[[int, int, int], None]
"""`report(index of the run, micro-batches done, in all)`."""
Messages: TypeAlias = "multiprocessing.Queue[tuple[int, int, int]]"
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


def check_plans(target: Target, config: Any, plans: Sequence[Plan]) -> None:
    """Find what is wrong with the settings, the data and every plan before anything runs, on a model without memory.

    Raises:
        UsageError: what is wrong.
    """
    import torch

    with torch.device("meta"):
        try:
            workload = target.build(config)
        except MemscopeError:
            raise
        except Exception:  # the runs will tell; this model may only be unable to live on the meta device
            return
        for plan in plans:
            plan.check(workload)


def run_all(specs: Sequence[RunSpec], report: Report) -> None:
    """Carry out every run and leave a trace file for each. The first failure ends the others.

    Raises:
        MemscopeError: what a run failed with.
    """
    context = multiprocessing.get_context("spawn")
    simulated = all(spec.simulated for spec in specs)
    workers, runs_each = (min(len(specs), _cores()), None) if simulated else (1, 1)
    messages: Messages = context.Queue()
    with ProcessPoolExecutor(
        workers, context, initializer=_begin_process, initargs=(messages,), max_tasks_per_child=runs_each
    ) as pool:
        futures = [pool.submit(_run, index, spec) for index, spec in enumerate(specs)]
        with _cancelled_on_error(pool):
            while not _finished(futures):
                for message in _waiting(messages):
                    report(*message)
            for message in _waiting(messages):
                report(*message)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished(futures: list[Future[None]]) -> bool:
    done, left = wait(futures, timeout=_POLL_SECONDS)
    for future in done:
        try:
            future.result()
        except BrokenProcessPool:
            raise TargetError(
                "a run ended without a word: its process was killed, most likely for want of host memory"
            ) from None
    return not left


@contextmanager
def _cancelled_on_error(pool: ProcessPoolExecutor) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _waiting(messages: Messages) -> Iterator[tuple[int, int, int]]:
    while True:
        try:
            yield messages.get_nowait()
        except Empty:
            return


_progress: Messages | None = None
"""Where a process of a run reports to; set once in each."""


def _begin_process(messages: Messages) -> None:
    """Know where to report, and end with the parent, however that ends."""
    global _progress
    _progress = messages
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process waits for its parent"
    parent.join()
    os._exit(1)


def _run(index: int, spec: RunSpec) -> None:
    if spec.allocator is not None and not spec.simulated:  # PyTorch reads it once, when it is loaded
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = spec.allocator
    import torch

    from memscope import record, simulate
    from memscope.simulation.allocator_settings import AllocatorSettings
    from memscope.simulation.devices import get_device, load_devices
    from memscope.strategies import Plan
    from memscope.target import find_target
    from memscope.workload import Workload

    torch.set_num_threads(1 if spec.simulated else _cores())

    def build() -> Workload:
        target = find_target(spec.target)
        workload = target.build(target.configure(spec.preset, spec.settings))
        applied = {strategy.name for strategy in Plan.parse(spec.plan).strategies}
        for other in spec.compared:
            for strategy in Plan.parse(other).strategies:
                if strategy.name not in applied:
                    strategy.baseline(workload)
        return workload

    def progress(done: int, total: int) -> None:
        assert _progress is not None, "_begin_process comes first"
        _progress.put((index, done, total))

    if spec.simulated:
        device = get_device(spec.device, load_devices(spec.device_file) if spec.device_file else None)
        allocator = None if spec.allocator is None else AllocatorSettings.parse(spec.allocator)
        trace = simulate(
            build, device=device, strategies=spec.plan, steps=spec.steps, allocator=allocator, progress=progress
        )
    else:
        trace = record(build, device=spec.device, strategies=spec.plan, steps=spec.steps, progress=progress)
    trace.save(spec.path)
