"""Worker processes that end when their parent ends, for whatever reason, and leave Ctrl-C to the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

__all__ = ["cores", "interrupts_held", "pool"]

_PRELOADED = ["memscope.simulation.simulate", "torch._dynamo"]
"""Slow imports. The first optimizer that is built imports `torch._dynamo`."""


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool(workers: int, initializer: Callable[..., None], *initargs: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes that call `initializer(*initargs)` first; an exception ends them at once."""
    executor = ProcessPoolExecutor(workers, _context(), initializer=_begin, initargs=(initializer, initargs))
    with executor:
        try:
            yield executor
        except BaseException:
            for process in list((executor._processes or {}).values()):
                process.terminate()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _context() -> BaseContext:
    """The start method of processes: on Linux, forks of a server process that has only done the slow imports."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    resource_tracker.ensure_running()  # otherwise the fork server starts it, which unblocks the interrupts held below
    with interrupts_held():
        forkserver.ensure_running()  # the server imports while this process goes on
    return context


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, and child processes started in it ignore SIGINT: the parent ends them.

    A pool starts its processes when work is submitted. A process whose start was interrupted would be orphaned.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    # The mask alone does not suffice: another thread may receive the signal, whose handler runs in the main thread.
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if in_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _begin(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process waits for its parent"
    parent.join()
    os._exit(1)
