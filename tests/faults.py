"""Tasks for worker processes: one that succeeds, and ways to break the process or its connection."""

from __future__ import annotations

import os
import signal
import threading
import time

from memscope.errors import UsageError
from memscope.runs import worker


class Unreadable(Exception):
    """Can be pickled, but not unpickled: its arguments are not those of its constructor."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def carry_out(fault: str, number: int) -> int:
    """Fall to a fault, or return the square of a number."""
    if fault:
        FAULTS[fault]()
    return number**2


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashed() -> None:
    os.abort()


def ended() -> None:
    os._exit(0)


def stuck() -> None:
    worker.tell("stuck")
    while True:
        time.sleep(0.01)


def stopped() -> None:
    worker.tell("stuck")
    os.kill(os.getpid(), signal.SIGSTOP)


def broken_pipe() -> None:
    os.closerange(3, 256)


def half_a_message() -> None:
    assert worker._parent is not None
    os.write(worker._parent.fileno(), (1000).to_bytes(4, "big") + b"half")
    os._exit(0)


def out_of_memory() -> None:
    bytearray(2**62)


def refused() -> None:
    raise UsageError("not this one")


def unreadable() -> None:
    raise Unreadable(1, 2)


FAULTS = {
    fault.__name__: fault
    for fault in (
        killed,
        crashed,
        ended,
        stuck,
        stopped,
        broken_pipe,
        half_a_message,
        out_of_memory,
        refused,
        unreadable,
    )
}


def lock() -> object:
    """A result that cannot be sent."""
    return threading.Lock()


def pid() -> int:
    return os.getpid()
