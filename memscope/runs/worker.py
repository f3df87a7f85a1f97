"""The child's side of a worker process: it carries out tasks, and leaves word of where it was when it died."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal, NoReturn, TypeAlias

from memscope.errors import MemscopeError, TargetError, where

__all__ = ["ASK_WHERE", "RunLost", "Sent", "tell", "work"]

Sent: TypeAlias = "tuple[Literal['begun', 'told', 'answer'], Any] | tuple[Literal['error'], tuple[Exception, str]]"
"""What a worker sends: that a task begins, a message of the task, its result, or an error with its traceback."""

ASK_WHERE = getattr(signal, "SIGUSR1", None) if hasattr(faulthandler, "register") else None
"""The signal upon which a worker writes down where it is; None: the system has none."""

_parent: Connection | None = None


class RunLost(TargetError):
    """A task has no result: it ran out of memory or time, or its process died. Other tasks may have results."""


def tell(message: object) -> None:
    """Send a message from a task to the parent process."""
    assert _parent is not None, "a task tells only in a worker process"
    _parent.send(("told", message))


def work(parent: Connection, last_words: str, initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    """Call `initializer(*initargs)`, then carry out tasks until the parent sends None or closes the connection.

    Standard output goes to stderr. Before the process dies, it writes the stack of its main thread to `last_words` if
    it can.
    """
    global _parent
    _parent = parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    _leave_word(last_words)
    begun = False
    while True:
        try:
            task = parent.recv()
        except EOFError:
            task = None
        if task is None:
            return
        function, arguments = task
        try:
            if not begun:
                initializer(*initargs)
                begun = True
            _send(parent, ("begun", None))
            _send(parent, ("answer", function(*arguments)))
        except BaseException as error:  # also what the target raises past `except Exception`
            _send(parent, ("error", (_as_sendable(error), traceback.format_exc())))


def _send(parent: Connection, sent: Sent) -> None:
    try:
        parent.send(sent)
    except OSError:  # the parent is gone, or the target closed the connection
        os._exit(1)


def _as_sendable(error: BaseException) -> Exception:
    """The error itself, if the parent can unpickle it; else one with the same text."""
    origin = _origin(error)
    if _is_out_of_host_memory(origin):
        return RunLost(f"the host ran out of memory{where(origin)}: close other programs, or choose smaller settings")
    if not isinstance(error, Exception):
        return TargetError(f"the target failed: {type(error).__name__}: {error}{where(error)}")
    try:
        same: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # exceptions with arguments of their own raise nearly anything here
        kind = type(error) if isinstance(error, MemscopeError) else RuntimeError
        return kind(f"{type(error).__name__}: {error}")
    return same


def _origin(error: BaseException) -> BaseException:
    """The error that memscope explains with this one; the error itself if there is none."""
    while isinstance(error, MemscopeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_out_of_host_memory(error: BaseException) -> bool:
    """Whether Python or PyTorch's CPU allocator (c10/core/impl/alloc_cpu.cpp) had no memory left."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _leave_word(last_words: str) -> None:
    """Write the stack of the main thread to a file on signals that end the process, `os._exit`, and `ASK_WHERE`."""
    file = open(last_words, "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.enable(file, all_threads=False)
    if ASK_WHERE is not None:
        faulthandler.register(ASK_WHERE, file, all_threads=False)
        faulthandler.register(signal.SIGTERM, file, all_threads=False, chain=True)
    own, leave = os.getpid(), os._exit

    def leave_with_word(status: int) -> NoReturn:
        if os.getpid() == own:
            faulthandler.dump_traceback(file, all_threads=False)
        leave(status)

    os._exit = leave_with_word


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process waits for its parent"
    parent.join()
    os._exit(1)
