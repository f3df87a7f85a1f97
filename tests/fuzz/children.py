"""Files in child processes: with limits on memory and time for each file, and a watch on what code does.

A child that dies names the file that it was at, and a new child goes on with the next one.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

__all__ = ["Finding", "Outcome", "Task", "run_files"]

MOST_SECONDS, MOST_BYTES = 5, 2**30
"""Bounds for one file: CPU seconds, and bytes of the process beyond those it has after its imports."""
_TALLY = struct.Struct("<qqdq")
"""Files done, refused, the most CPU seconds and bytes: shared with the parent, which reads it when the child ended."""
_WATCHED = (
    "os.", "subprocess.", "socket.", "shutil.", "pickle.find_class", "ctypes.", "exec", "urllib.", "ftplib.", "pty.",
)  # fmt: skip
_USUAL = ("importlib._bootstrap>", "importlib._bootstrap_external>", typing.__file__, "_plotly_utils/basevalidators.py")
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fspath")


@dataclass(frozen=True)
class Task:
    """Files of one format: `make(number)` gives the bytes of a file, `use(path)` reads it, and raises `told` if not."""

    name: str
    suffix: str
    make: Callable[[int], bytes]
    use: Callable[[Path, Random], None]
    told: tuple[type[BaseException], ...]


@dataclass(frozen=True)
class Finding:
    """A file that memscope does not withstand."""

    task: str
    number: int
    reason: str


@dataclass
class Outcome:
    """What came of some files."""

    files: int = 0
    refused: int = 0
    slowest: float = 0.0
    most_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Add the outcome of other files."""
        self.files += other.files
        self.refused += other.refused
        self.slowest = max(self.slowest, other.slowest)
        self.most_bytes = max(self.most_bytes, other.most_bytes)
        self.findings += other.findings


def run_files(
    task: Task, numbers: Sequence[int], most_bytes: int = MOST_BYTES, most_seconds: int = MOST_SECONDS
) -> Outcome:
    """Read files of one format in child processes, one after another."""
    whole, left = Outcome(), list(numbers)
    while left:
        tally = mmap.mmap(-1, _TALLY.size)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _in_child(task, left, tally, writer, most_bytes, most_seconds)
        os.close(writer)
        with os.fdopen(reader) as answers:
            findings = [Finding(task.name, *json.loads(line)) for line in answers]
        _, status = os.waitpid(child, 0)
        done, refused, slowest, grown = _TALLY.unpack(tally[:])
        if status:
            reason = f"the process ended with status {status}"
            if os.WIFSIGNALED(status):
                number = signal.Signals(os.WTERMSIG(status))
                reason = f"more than {most_seconds} s" if number == signal.SIGPROF else f"killed by {number.name}"
            findings.append(Finding(task.name, left[done], reason))
            done += 1
        whole.add(Outcome(done, refused, slowest, grown, findings))
        left = left[done:]
    return whole


def _in_child(
    task: Task, numbers: Sequence[int], tally: mmap.mmap, writer: int, most_bytes: int, most_seconds: int
) -> None:
    code = 1
    try:
        _read_all(task, numbers, tally, writer, most_bytes, most_seconds)
        code = 0
    finally:
        os._exit(code)


def _read_all(
    task: Task, numbers: Sequence[int], tally: mmap.mmap, writer: int, most_bytes: int, most_seconds: int
) -> None:
    """Read the files; each finding becomes a line at once, because the next file may end the process."""
    watch = _Watch()
    sys.addaudithook(watch)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + most_bytes, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, slowest, grown = 0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{task.suffix}"
        for done, number in enumerate(numbers):
            tally[:] = _TALLY.pack(done, refused, slowest, grown)
            path.write_bytes(task.make(number))
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, most_seconds)  # ends the process, also inside C
            reason = ""
            try:
                watch.events = []
                task.use(path, Random(number))
            except task.told as error:
                refused += 1
                reason = _bad_message(str(error))
            except BaseException as error:
                origin = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:]]
                reason = f"{type(error).__name__}: {str(error)[:200]} in {' < '.join(origin)}"
            finally:
                seen, watch.events = watch.events, None
                signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - began)
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            if seen:
                reason = f"code did {seen[0]}"
            if reason:
                os.write(writer, f"{json.dumps([number, reason])}\n".encode())
    tally[:] = _TALLY.pack(len(numbers), refused, slowest, grown)


def _bad_message(text: str) -> str:
    """Why a message is no help; empty if it is one."""
    if len(text) > 5000:
        return f"a message of {len(text)} characters: {text[:80]}"
    if not text.strip():
        return "an empty message"
    return ""


class _Watch:
    """Notes what no reader does: programs, networks, changes of files. Active while `events` is a list."""

    def __init__(self) -> None:
        self.events: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is None:
            return
        writes = event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
        if (writes or (event.startswith(_WATCHED) and event not in _HARMLESS)) and not _is_usual():
            self.events.append(f"{event} {arguments[0]!r}"[:200])


def _is_usual() -> bool:
    """Whether a module is being imported, or types or a figure's validators are built: code runs, but not a file's."""
    frame: FrameType | None = sys._getframe(2)
    while frame and not frame.f_code.co_filename.endswith(_USUAL):
        frame = frame.f_back
    return frame is not None
