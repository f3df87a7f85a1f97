"""Start a program, wait for it, end it where that is needed, and collect what it leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from memscope import errors
from memscope.errors import MemscopeError, TargetError, UsageError
from memscope.interrupts import INTERRUPTED, interrupts_delayed, undone
from memscope.program.command_line import CommandLine, advice_for
from memscope.program.environment import environment_of
from memscope.program.request import Failure, Offers, ProgramOutcome, Request
from memscope.program.scratch import Scratch
from memscope.program.terminal import terminal_given
from memscope.trace import Trace
from memscope.trace.notes import add_note
from memscope.units import format_seconds

__all__ = ["ProgramEnd", "StepReport", "launch"]

StepReport: TypeAlias = Callable[[int], None]
"""Called with the number of the step that the program begins, counted from 1."""

_PAUSE_SECONDS = 0.05
_PATIENCE_SECONDS = 10.0
"""How long a program may take to end after it has left its results."""
_PATIENCE_STEPS = 2.0
"""How long a program may take to complete its step after the deadline, in steps of the length that it had so far."""
_GRACE_SECONDS = 5.0
"""How long a program may take to end after SIGTERM, before SIGKILL."""
_TAIL_LINES = 20


@dataclass(frozen=True)
class ProgramEnd:
    """How a run of a program ended."""

    exit_code: int
    """As shells give it: 128 and the number of the signal that ended the program."""
    trace: Trace | None
    """What was recorded; None: see `error`."""
    error: MemscopeError | None
    """The reason, if there is no trace."""
    offers: Offers | None = None
    """What could be changed in the program, if the request asked for it."""


def launch(
    program: CommandLine,
    request: Request,
    *,
    log: Path | None = None,
    timeout_seconds: float | None = None,
    keeps_steps: bool = False,
    report: StepReport = lambda step: None,
) -> ProgramEnd:
    """Run a program to its end, or to the end of its last step, and return what it leaves.

    Its stdin is this process's own. What it prints, on stdout too, goes to stderr, or to `log`.

    Args:
        program: the program.
        request: what is asked of it; it names a scratch folder.
        log: file for what it prints.
        timeout_seconds: longest time of the run; None: no limit.
        keeps_steps: whether a program that is not done by then leaves the trace of its complete steps, if it has any.
        report: is told the steps.

    Raises:
        UsageError: the program cannot be started.
    """
    if os.name != "posix":
        raise UsageError("memscope profile -- COMMAND needs Linux or macOS: write the step as a target instead")
    scratch = Scratch(Path(request.folder))
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    request = replace(request, deadline=deadline if keeps_steps else None)
    request.write(scratch.request)
    with contextlib.ExitStack() as scopes:
        output: Any = 2 if log is None else scopes.enter_context(log.open("wb"))
        with interrupts_delayed():
            process = _started(program, environment_of(request, os.environ), output)
            scopes.enter_context(undone(partial(_end, process, scratch)))
        with terminal_given(process.pid):
            why = _wait(process, scratch, deadline, keeps_steps, report)
            if why is not None:
                _end(process, scratch)
            elif scratch.outcome.exists():
                _end_others(process, scratch)
    if process.returncode in (-signal.SIGINT, INTERRUPTED):  # Ctrl-C in a terminal goes to the program alone
        signal.raise_signal(signal.SIGINT)
    return _collected(program, request, process.returncode, why, timeout_seconds, log)


def _started(program: CommandLine, environment: dict[str, str], output: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            program.words,
            executable=program.path,
            env=environment,
            stdout=output,
            stderr=output,
            process_group=0,
        )
    except OSError as error:
        raise UsageError(f'"{program.words[0]}" cannot be started: {error.strerror}') from error


def _wait(
    process: subprocess.Popen[bytes], scratch: Scratch, deadline: float | None, keeps_steps: bool, report: StepReport
) -> str | None:
    """Wait until the process has ended; or say why it must be ended: `lingers`, `timeout`."""
    patience, told, began = None, None, 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PAUSE_SECONDS)
            return None
        step = scratch.step()
        if step is not None and step != told:
            began = began if told else time.monotonic()
            told = step
            report(step)
        if patience is None and scratch.outcome.exists():
            patience = time.monotonic() + _PATIENCE_SECONDS
        if patience is not None:
            if time.monotonic() > patience:
                return "lingers"
        elif deadline is not None and time.monotonic() > deadline:
            of_step = max(_PATIENCE_SECONDS, _PATIENCE_STEPS * (deadline - began) / told) if told else 0.0
            if not keeps_steps or time.monotonic() > deadline + of_step:
                return "timeout"


def _end(process: subprocess.Popen[bytes], scratch: Scratch) -> None:
    """End the process and those that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        for group in {process.pid, *scratch.groups()}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)


def _end_others(process: subprocess.Popen[bytes], scratch: Scratch) -> None:
    """End what a program that memscope stopped has left running: its own last lines would have ended it."""
    if ProgramOutcome.read(scratch.outcome).ended in ("stopped", "late"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)


def _collected(
    program: CommandLine,
    request: Request,
    status: int,
    why: str | None,
    timeout_seconds: float | None,
    log: Path | None,
) -> ProgramEnd:
    """The end of a program, from its exit status and the files that it left."""
    scratch = Scratch(Path(request.folder))
    exit_code = 128 - status if status < 0 else status
    outcome = ProgramOutcome.read(scratch.outcome) if scratch.outcome.exists() else None
    failed = partial(ProgramEnd, exit_code, None)
    if outcome is None and why == "timeout":
        assert timeout_seconds is not None, "only a run with a limit can exceed it"
        return failed(TargetError(_too_slow(request, scratch, timeout_seconds)))
    if outcome is None:
        return failed(_nothing_left(program, scratch, status, log))
    if outcome.failure is not None:
        return failed(_as_error(outcome.failure))
    trace = Trace.load(scratch.trace) if outcome.trace else None
    ran_out = trace is not None and bool(trace.meta.get("out_of_memory"))
    if trace is None or (outcome.steps == 0 and not ran_out):
        what = "began a training step, but completed none"
        return failed(TargetError(_without_step(what, program, status, log, outcome.exception)))
    meta = {
        **trace.meta,
        "target": program.name,
        "program": {"command": list(program.words), "exit_code": exit_code},
    }
    if outcome.ended == "late" and timeout_seconds is not None:
        add_note(meta, _late(request, outcome.steps, timeout_seconds))
    for note in (*outcome.notes, *_notes(request, outcome, status, why, scratch)):
        add_note(meta, note)
    return ProgramEnd(exit_code, replace(trace, meta=meta), None, outcome.offers)


def _notes(request: Request, outcome: ProgramOutcome, status: int, why: str | None, scratch: Scratch) -> list[str]:
    """What is unusual about the end of a program that has results."""
    notes = []
    done = f"{outcome.steps} optimizer step{'s' * (outcome.steps != 1)}"
    if outcome.ended == "failed":
        notes.append(f"The program failed after {done} ({_ending(status)}): {outcome.exception}")
    elif why == "lingers":
        notes.append(
            f"The program did not end within {format_seconds(_PATIENCE_SECONDS)} of its last step: memscope ended it"
        )
    elif status and outcome.ended == "ended":
        notes.append(f"The program ended after {done} with an error ({_ending(status)})")
    elif status:
        notes.append(f"After memscope had stopped the program, it ended with an error ({_ending(status)})")
    elif outcome.ended == "ended" and request.steps is not None and outcome.steps < request.steps:
        notes.append(f"The program ended after {done}: {request.steps} were asked for")
    notes += [f"Another process of the program trains as well and was not followed: {one}" for one in scratch.others()]
    return notes


def _late(request: Request, steps: int, timeout_seconds: float) -> str:
    """The note on a program that was stopped at its deadline."""
    asked = "all steps" if request.steps is None else request.steps
    return (
        f"The program was stopped after {steps} optimizer step{'s' * (steps != 1)}, because --timeout "
        f"{format_seconds(timeout_seconds)} had passed: {asked} were asked for"
    )


def _too_slow(request: Request, scratch: Scratch, timeout_seconds: float) -> str:
    limit, step = format_seconds(timeout_seconds), scratch.step()
    if step is None:
        return (
            f"the program took no optimizer step within {limit}, and was ended: raise --timeout, or give it less to do "
            "before it trains"
        )
    asked = "to its end" if request.steps is None else f"{request.steps} step{'s' * (request.steps != 1)}"
    return (
        f"the program was in step {step} after {limit}, and was ended (asked for: {asked}): raise --timeout, or choose "
        "fewer --steps"
    )


def _nothing_left(program: CommandLine, scratch: Scratch, status: int, log: Path | None) -> MemscopeError:
    """The error of a program without an outcome."""
    unattached = dict(scratch.unattached())
    if unattached:
        python, reason = next(iter(unattached.items()))
        return UsageError(f"the program runs {python}, and {reason}: {advice_for(python)}")
    step = scratch.step()
    if step is not None:
        return TargetError(f"the program was lost in step {step} ({_ending(status)}): its process left no results")
    return TargetError(_without_step("did not train", program, status, log, None, others=list(scratch.others())))


def _without_step(
    what: str,
    program: CommandLine,
    status: int,
    log: Path | None,
    exception: str | None,
    others: list[str] | None = None,
) -> str:
    """The message of a program that has completed no optimizer step."""
    if status or exception:
        reason = f": {exception}" if exception else ""
        return f"{program.name} failed before its first optimizer step ended ({_ending(status)}){reason}{_output(log)}"
    text = (
        f"{program.name} ended without an optimizer step: it {what}. Expected: the call of an nn.Module with "
        "gradients, and step() of a torch.optim.Optimizer"
    )
    if others:
        text += f", in a process that is not a fork (it trained in {others[0]})"
    return text + _output(log)


def _output(log: Path | None) -> str:
    """Where the program's output is; the end of its log."""
    if log is None:
        return ""
    with log.open(errors="replace") as file:
        tail = "".join(deque(file, _TAIL_LINES)).rstrip()
    return f"\nIts output ({log}) ends with:\n{tail}" if tail else "\nIt printed nothing"


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"


class _InProgram(Exception):
    """The traceback of an error in a program, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _as_error(failure: Failure) -> MemscopeError:
    """The error that a process of the program has left."""
    kind: type[MemscopeError] = getattr(errors, failure.kind, MemscopeError)
    error = kind(failure.message)
    error.__cause__ = _InProgram(failure.traceback)
    return error
