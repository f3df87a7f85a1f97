"""Worker processes, one task at a time each. A worker that dies or is stuck costs its own task and no other.

They end when their parent ends, for whatever reason, and leave Ctrl-C to the parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from memscope.errors import MemscopeError, place
from memscope.interrupts import interrupts_held, raise_if_interrupted, undone
from memscope.runs.worker import ASK_WHERE, RunLost, work
from memscope.units import format_seconds

__all__ = ["Workers", "alone", "cores", "preload", "workers"]

T = TypeVar("T")

_PRELOADED = [
    "memscope.simulation.simulate",
    "torch._dynamo",  # imported with the first optimizer that is built
    "memscope.analysis.summary",  # imported with the first public name that a target uses
    *(f"memscope.strategies.{name}" for name in ("amp", "bf16", "ckpt", "ga", "lora", "optim")),
    "memscope.runs.worker",
]
"""Imports that take long, and that nearly every run needs."""
_PATIENCE_SECONDS = 5.0
"""How long a worker may take to say where it is, or to end by itself, before it is killed."""
_PAUSE_SECONDS = 0.01
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
"""A line of `faulthandler` (Python/traceback.c, `dump_frame`)."""


def preload(modules: Sequence[str]) -> None:
    """Import these modules too before processes are forked, which share them. Call it before the first process starts.

    A module that is not installed is left out. Without a fork server, this has no effect.
    """
    _PRELOADED.extend(name for name in modules if name not in _PRELOADED)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nothing() -> None: ...


@contextlib.contextmanager
def workers(
    count: int, initializer: Callable[..., None] = _nothing, *initargs: Any, timeout_seconds: float | None = None
) -> Iterator[Workers]:
    """Up to `count` fresh processes that call `initializer(*initargs)` first; the end of the block ends them.

    `timeout_seconds` is the longest time of one task; None: no limit.
    """
    with TemporaryDirectory(prefix="memscope-") as folder:
        team = Workers(count, initializer, initargs, timeout_seconds, _context(), Path(folder))
        with undone(team.kill):
            yield team
            team.dismiss()


def alone(function: Callable[..., T], *arguments: Any, timeout_seconds: float | None = None) -> T:
    """Call a function in a fresh process and return its result.

    Raises:
        MemscopeError: the function raised it.
        RunLost: the process died, or took longer than `timeout_seconds`.
    """
    with workers(1, timeout_seconds=timeout_seconds) as team:
        ((_, answer),) = team.answers(function, [arguments])
    if isinstance(answer, MemscopeError):
        raise answer
    return answer


def _context() -> ForkServerContext | SpawnContext:
    """The start method of processes: on Linux, forks of a server process that has only done the slow imports."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    resource_tracker.ensure_running()  # otherwise the fork server starts it, which unblocks the interrupts held below
    with interrupts_held():
        forkserver.ensure_running()  # the server imports while this process goes on
    return context


@dataclass
class Workers:
    """A team of worker processes."""

    count: int
    initializer: Callable[..., None]
    initargs: tuple[Any, ...]
    timeout_seconds: float | None
    context: ForkServerContext | SpawnContext
    folder: Path
    """Where the workers leave word."""
    _all: list[_Worker] = field(default_factory=list)
    _started: int = 0

    def answers(
        self,
        function: Callable[..., T],
        tasks: Sequence[tuple[Any, ...]],
        hear: Callable[[Any], object] = lambda message: None,
    ) -> Iterator[tuple[int, T | MemscopeError]]:
        """Call `function(*task)` for all tasks in worker processes; yield index and result as they come.

        An error that memscope explains is a result, also that a process died or took too long (`RunLost`); the other
        tasks go on. Whoever stops iterating stops the tasks.

        Args:
            function: the work; importable, as are its arguments.
            tasks: the arguments of each call.
            hear: receives what tasks `tell`.

        Raises:
            Exception: a task raised one that is no `MemscopeError`.
        """
        waiting = deque(enumerate(tasks))
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self.count:
                    index, arguments = waiting.popleft()
                    self._free_worker().begin(index, (function, arguments), self.timeout_seconds)
                raise_if_interrupted()
                for worker in self._with_news():
                    index = worker.index
                    for answer in worker.received(hear):
                        yield index, answer
                self._all = [worker for worker in self._all if not worker.is_lost]
        finally:
            for worker in self._busy:
                worker.kill()
            self._all = [worker for worker in self._all if not worker.is_lost]

    def kill(self) -> None:
        """End all processes at once."""
        for worker in self._all:
            worker.kill()

    def dismiss(self) -> None:
        """Let the processes, which have no task, end by themselves."""
        for worker in self._all:
            worker.send(None)
        for worker in self._all:
            worker.process.join(_PATIENCE_SECONDS)

    @property
    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._all if worker.is_busy]

    def _free_worker(self) -> _Worker:
        for worker in self._all:
            if not worker.is_busy:
                if worker.process.is_alive():
                    return worker
                worker.kill()  # it was killed between two tasks
        self._started += 1
        worker = _Worker.start(self.context, self.folder / str(self._started), self.initializer, self.initargs)
        self._all = [*(other for other in self._all if not other.is_lost), worker]
        return worker

    def _with_news(self) -> list[_Worker]:
        """Busy workers that sent something, ended, or ran out of time; waits until there are some."""
        busy = self._busy
        deadlines = [worker.deadline for worker in busy if worker.deadline is not None]
        left = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = set(wait([one for worker in busy for one in (worker.connection, worker.process.sentinel)], left))
        return [
            worker
            for worker in busy
            if {worker.connection, worker.process.sentinel} & ready
            or (worker.deadline is not None and worker.deadline <= time.monotonic())
        ]


@dataclass
class _Worker:
    """A worker process as its parent sees it."""

    process: Any
    connection: Any
    last_words: Path
    index: int = 0
    """Index of the task it works on."""
    is_busy: bool = False
    is_lost: bool = False
    timeout_seconds: float | None = None
    deadline: float | None = None

    @classmethod
    def start(
        cls,
        context: ForkServerContext | SpawnContext,
        last_words: Path,
        initializer: Callable[..., None],
        initargs: tuple[Any, ...],
    ) -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, str(last_words), initializer, initargs))
        with interrupts_held():
            process.start()
        theirs.close()
        return cls(process, ours, last_words)

    def begin(self, index: int, task: tuple[Any, ...], timeout_seconds: float | None) -> None:
        self.index, self.is_busy, self.timeout_seconds, self.deadline = index, True, timeout_seconds, None
        self.send(task)

    def send(self, task: tuple[Any, ...] | None) -> None:
        """Send a task, or None for the end."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just died: its sentinel tells
            self.connection.send(task)

    def received(self, hear: Callable[[Any], object]) -> Iterator[Any]:
        """What the worker has sent: at most one answer, which may be that it is lost."""
        try:
            while self.connection.poll():
                kind, content = self.connection.recv()
                if kind == "told":
                    hear(content)
                    continue
                if kind == "begun":
                    limit = self.timeout_seconds
                    self.deadline = None if limit is None else time.monotonic() + limit
                    continue
                self.is_busy = False
                yield content if kind == "answer" else _error(*content)
                return
        except (EOFError, OSError):
            self.process.join(_PATIENCE_SECONDS)
            yield self._lost()
            return
        if not self.process.is_alive():
            yield self._lost()
        elif self.deadline is not None and self.deadline <= time.monotonic():
            yield self._timed_out()

    def kill(self) -> None:
        """End the process at once."""
        self.is_busy, self.is_lost = False, True
        self.process.kill()
        self.process.join(_PATIENCE_SECONDS)
        self.connection.close()

    def _lost(self) -> RunLost:
        code = self.process.exitcode
        self.kill()
        if code is None:
            return RunLost(
                "the target closed the connection of its process to memscope: leave open files to others alone"
            )
        if code >= 0:
            return RunLost(
                f"the target ended its process with exit code {code}{self._place()}: "
                "let it return, or raise an error, so that memscope can go on"
            )
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        if -code == getattr(signal, "SIGKILL", 9):
            return RunLost(
                f"the target's process was killed ({name}), probably because the host ran out of memory: "
                "close other programs, or choose smaller settings"
            )
        return RunLost(f"the target's process died of {name}{self._place()}")

    def _timed_out(self) -> RunLost:
        assert self.timeout_seconds is not None, "only a task with a limit can exceed it"
        limit = format_seconds(self.timeout_seconds)
        if ASK_WHERE is not None and self.process.pid is not None:
            os.kill(self.process.pid, ASK_WHERE)
            for _ in range(round(_PATIENCE_SECONDS / _PAUSE_SECONDS)):
                if self._place():
                    break
                time.sleep(_PAUSE_SECONDS)
        found = self._place()
        self.kill()
        return RunLost(f"the target took longer than {limit}{found}: raise --timeout, or choose smaller settings")

    def _place(self) -> str:
        """The user's line at which the process was last, from what it wrote; empty if that is not known."""
        try:
            text = self.last_words.read_text(errors="replace")
        except OSError:
            return ""
        stack = text.rpartition("(most recent call first):\n")[2]
        return place([(file, int(line), name) for file, line, name in _FRAME.findall(stack)])


class _InWorker(Exception):
    """The traceback of an error in a worker process, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _error(error: Exception, text: str) -> MemscopeError:
    error.__cause__ = _InWorker(text)
    if isinstance(error, MemscopeError):
        return error
    raise error
