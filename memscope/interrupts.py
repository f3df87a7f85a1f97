"""Ctrl-C: it ends a command at once, wherever the command is.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. Callbacks of weak references drop the
exception, and libraries catch it or turn it into errors of their own. So a command ends inside the handler of the
signal, where nothing can lose it; what must not be left half done is registered with `undone`.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = [
    "INTERRUPTED",
    "end_on_interrupt",
    "interrupt_taken",
    "interrupts_delayed",
    "interrupts_held",
    "interrupts_raised",
    "raise_if_interrupted",
    "undone",
]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it: 128 + SIGINT."""
_SHOW_CURSOR = "\x1b[?25h"
"""ECMA-48 sequence: a progress bar that is on the terminal has hidden the cursor."""

_undoing: list[Callable[[], None]] = []
_process = 0
"""The process that `end_on_interrupt` was called in: a fork of it must not undo what is not its own."""
_raised = False
"""Whether Ctrl-C came in the present block of `interrupts_raised`, and nobody has taken it yet."""


def end_on_interrupt() -> None:
    """From now on, Ctrl-C ends this process with one line on stderr and exit code 130.

    Where the process was started to ignore Ctrl-C, as by `nohup`, it still does.
    """
    global _process
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        _process = os.getpid()
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGINT, lambda number, frame: _leave())  # a second Ctrl-C does not wait for the first
    if os.getpid() != _process:
        os._exit(INTERRUPTED)
    sys.unraisablehook = lambda _: None  # what fails from here on has no reader
    for undo in reversed(_undoing):
        with suppress(Exception):
            undo()
    atexit._run_exitfuncs()  # removes temporary folders and the like, as `sys.exit` would
    _leave()


def _leave() -> None:
    line = f"{_SHOW_CURSOR}\nstopped\n" if os.isatty(2) else "stopped\n"
    with suppress(OSError):
        os.write(2, line.encode())  # not `print`, which the signal may have interrupted
    os._exit(INTERRUPTED)


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` at the end of the block, and also when Ctrl-C ends the process inside it.

    `undo` may be called before the block has done anything, and twice.
    """
    _undoing.append(undo)
    try:
        yield
    finally:
        undo()
        _undoing.remove(undo)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, and child processes started in it ignore SIGINT: the parent ends them.

    A child process whose start was interrupted would be orphaned, a file half written.
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


@contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; a child process that is started in it can be interrupted as usual."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def interrupts_raised() -> Iterator[Callable[[], bool]]:
    """Ctrl-C raises `KeyboardInterrupt` in the block, whose work has results to show; a second one ends the process.

    Yields a function that returns whether Ctrl-C came.
    """
    global _raised
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        global _raised
        _raised = True
        came.append(number)
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(came)
    finally:
        _raised = False
        signal.signal(signal.SIGINT, before)


def raise_if_interrupted() -> None:
    """Raise the `KeyboardInterrupt` of a block of `interrupts_raised` again, in case a library has caught it.

    Raises:
        KeyboardInterrupt: Ctrl-C came in this block, and `interrupt_taken` was not called since.
    """
    if _raised:
        raise KeyboardInterrupt


def interrupt_taken() -> None:
    """Say that `KeyboardInterrupt` was caught on purpose, so that `raise_if_interrupted` need not raise it again."""
    global _raised
    _raised = False
