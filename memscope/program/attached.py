"""Memscope in a Python process of a program: watches it, and writes what it found when the process ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from memscope.errors import MemscopeError, OutOfDeviceMemory, UsageError
from memscope.hooks.out_of_memory import is_out_of_memory
from memscope.program.request import VARIABLE, Failure, ProgramOutcome, Request
from memscope.program.scratch import Scratch
from memscope.program.stop import Enough
from memscope.program.watch import ProgramWatch, begin

__all__ = ["attach"]

_SIMULATE = (
    "a GPU is recorded from the first call of a model on. To see what the program needs, simulate it: choose --device "
    "among those of memscope devices"
)
_MOST_STOPS = 3
"""How often a program that catches `Enough` is stopped again before its process is ended."""


def attach() -> None:
    """Begin to watch this process, as the request in the environment says; called once, after torch is imported."""
    request = Request.read(Path(os.environ[VARIABLE]))
    scratch = Scratch(Path(request.folder))
    try:
        _refuse_many_processes()
        watching = _Watching(request, scratch)
    except MemscopeError as error:
        ProgramOutcome("failed", 0, failure=Failure.of(error, traceback.format_exc())).write(scratch.outcome)
        _leave(1)
    watching.listen()


def _refuse_many_processes() -> None:
    """Refuse a process that is one of several that a launcher such as `torchrun` has started.

    Raises:
        UsageError: it is.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and world != "1":
        raise UsageError(
            f"the program trains in {world} processes (WORLD_SIZE={world}), which memscope cannot profile yet: start "
            "it with one, for example torchrun --nproc-per-node 1, accelerate launch --num_processes 1"
        )


class _Watching:
    """The watch of this process, its end, and the results."""

    def __init__(self, request: Request, scratch: Scratch) -> None:
        self._scratch = scratch
        self._finished = False
        self._stops = 0
        self._watch: ProgramWatch = begin(request, self.stop)

    def listen(self) -> None:
        """Finish when the process ends, also by `os._exit`, and leave memscope's own errors to the launcher."""
        atexit.register(self._end)
        leave, shown = os._exit, sys.excepthook

        def exit_now(status: int) -> NoReturn:
            self._end()
            leave(status)

        def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if not isinstance(error, MemscopeError) or not self._has_the_word:
                shown(kind, error, trace)

        os._exit, sys.excepthook = exit_now, show

    def stop(self) -> None:
        """Write the results and end the program by an exception, which it cannot mistake for an error.

        Raises:
            Enough: always, but in a fork of this process.
        """
        if self._scratch.is_fork:
            return
        if not self._finished:
            self._finish("late" if self._watch.is_late else "stopped", None)
            register_module_forward_pre_hook(self._stop_again)
        self._stops += 1
        if self._stops > _MOST_STOPS:
            _leave(0)
        raise Enough

    @property
    def _has_the_word(self) -> bool:
        """Whether this process may write the outcome: no other process is recorded."""
        return self._watch.has_claimed or not self._scratch.is_claimed

    def _stop_again(self, module: torch.nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            self.stop()

    def _end(self) -> None:
        if self._finished or self._scratch.is_fork:
            return
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # 3.12 and later; 3.11
        self._finish("failed" if error else "ended", error)

    def _finish(self, ended: Literal["stopped", "late", "ended", "failed"], error: BaseException | None) -> None:
        self._finished = True
        watch, scratch = self._watch, self._scratch
        failure, trace = None, None
        last_line = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1] if error else None
        try:
            trace = watch.finish(error)
            if trace is not None:
                trace.save(scratch.trace)
        except MemscopeError as refused:
            failure, trace = Failure.of(refused, traceback.format_exc()), None
        except Exception as bug:
            text = traceback.format_exc()
            what = MemscopeError(
                f"memscope failed in the program: {type(bug).__name__}: {bug}. This is a bug in memscope"
            )
            failure, trace = Failure.of(what, text), None
        if failure is None and isinstance(error, MemscopeError):
            failure = Failure.of(error, "".join(traceback.format_exception(error)))
        if failure is None and trace is None and is_out_of_memory(error):
            failure = Failure.of(OutOfDeviceMemory(f"the program ran out of memory before it trained: {_SIMULATE}"))
        if watch.has_claimed or (failure is not None and self._has_the_word):
            path = None if trace is None else str(scratch.trace)
            notes = tuple(watch.notes)
            ProgramOutcome(ended, watch.steps, path, failure, last_line, notes, watch.offers).write(scratch.outcome)


def _leave(code: int) -> NoReturn:
    """End this process at once, with everything printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
