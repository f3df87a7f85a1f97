"""The terminal of a program that runs in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

__all__ = ["terminal_given"]


@contextlib.contextmanager
def terminal_given(process: int) -> Iterator[None]:
    """Let a process, which leads its group, read from the terminal, as a shell does; take the terminal back at the end.

    Without it the terminal would stop a program that reads stdin. Ctrl-C goes to the program meanwhile. Where stdin is
    no terminal, or belongs to another process group, nothing changes.
    """
    try:
        is_ours = os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        is_ours = False
    if not is_ours:
        yield
        return
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # sent to a background process that changes it
    try:
        with contextlib.suppress(OSError):  # the process has ended already
            os.tcsetpgrp(0, process)
            os.killpg(process, signal.SIGCONT)  # it may have been stopped for reading too early
        yield
    finally:
        with contextlib.suppress(OSError):
            os.tcsetpgrp(0, os.getpgrp())
        signal.signal(signal.SIGTTOU, before)
