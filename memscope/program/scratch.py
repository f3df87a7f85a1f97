"""The scratch folder in which a launcher and the processes of its program leave word for each other."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memscope.errors import TraceFileError
from memscope.trace import write_whole

__all__ = ["Scratch"]


@dataclass(frozen=True)
class Scratch:
    """The files of one run of a program."""

    folder: Path
    process: int = field(default_factory=os.getpid)
    """The process that made this object: a fork of it has another number."""

    @property
    def request(self) -> Path:
        """The launcher's `Request`."""
        return self.folder / "request.json"

    @property
    def outcome(self) -> Path:
        """The `ProgramOutcome`, once the process that trains has ended."""
        return self.folder / "outcome.json"

    @property
    def trace(self) -> Path:
        """The trace."""
        return self.folder / "trace.npz"

    @property
    def is_fork(self) -> bool:
        """Whether the present process is a fork of the one that made this object."""
        return os.getpid() != self.process

    @property
    def is_claimed(self) -> bool:
        """Whether a process has begun a training step."""
        return (self.folder / "claimed").exists()

    def claim(self) -> bool:
        """Whether this process is the one to record: the first that begins a training step, and no fork.

        Any other process that asks is listed among `others`.
        """
        if not self.is_fork:
            with contextlib.suppress(FileExistsError, FileNotFoundError):  # not found: it has outlived the launcher
                with (self.folder / "claimed").open("x") as file:
                    file.write(str(os.getpid()))
                return True
        me = {"pid": os.getpid(), "argv": sys.orig_argv, "fork": self.is_fork}
        with contextlib.suppress(TraceFileError):  # as above
            write_whole(self.folder / f"other-{os.getpid()}.json", json.dumps(me).encode())
        return False

    def groups(self) -> Iterator[int]:
        """The process group of the process that is recorded, while it runs: a launcher may have made one for it."""
        with contextlib.suppress(OSError, ValueError):
            group = os.getpgid(int((self.folder / "claimed").read_text()))
            if group != os.getpgrp():
                yield group

    def others(self) -> Iterator[str]:
        """In words, the processes that train beside the one that is recorded."""
        for path in sorted(self.folder.glob("other-*.json")):
            one = json.loads(path.read_bytes())
            kind = "a fork, of" if one["fork"] else "command"
            yield f"process {one['pid']} ({kind} {' '.join(one['argv'])})"

    def unattached(self) -> Iterator[tuple[str, str]]:
        """Python interpreters that memscope could not be attached to, with the reason."""
        for path in sorted(self.folder.glob("unattached-*.json")):
            one = json.loads(path.read_bytes())
            yield one["python"], one["reason"]

    def tell_step(self, number: int) -> None:
        """Tell the launcher that step `number`, counted from 1, begins."""
        if not self.is_fork:
            with contextlib.suppress(TraceFileError):  # a full disk; this process has outlived the launcher
                write_whole(self.folder / "step", str(number).encode())

    def step(self) -> int | None:
        """The number of the step that the program is in; None before the first."""
        try:
            return int((self.folder / "step").read_bytes())
        except (OSError, ValueError):
            return None
