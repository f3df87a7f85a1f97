"""`memscope advise … -- COMMAND`: a plan for a training program, which is run again for each plan that is tried."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from memscope.advisor.advice import Advice
from memscope.advisor.advise import DEFAULT_DEVICE, budget_of, require_rates
from memscope.advisor.combinations import allowed_names
from memscope.advisor.programs import ProgramAdvisor
from memscope.allocator.settings import AllocatorSettings
from memscope.command.progress import shown_progress
from memscope.errors import MemscopeError, UsageError
from memscope.program.command_line import CommandLine, resolve_program
from memscope.program.launch import launch
from memscope.program.request import Offers, Request
from memscope.simulation.assumptions import Assume
from memscope.simulation.devices.catalogue import get_device, load_devices
from memscope.strategies import Plan
from memscope.trace import Progress, Trace
from memscope.units import parse_seconds

__all__ = ["AskedProgram", "Subject", "advised_program"]

_STEPS = 2
"""The second step is the first with optimizer state."""


@dataclass(frozen=True)
class AskedProgram:
    """What `memscope advise` is asked for a program, as on the command line."""

    budget: str
    device: str | None
    device_file: Path | None
    strategies: str
    allow: Sequence[str]
    layer_list: str
    allocator: str | None
    assume: str
    timeout: str | None


@dataclass(frozen=True)
class Subject:
    """What an advice is about, in words of further commands."""

    device: str
    profile: Callable[[str], Sequence[object]]
    """`memscope profile …` on a device."""
    program: Sequence[str] = ()
    """The program's command line, which follows `--`."""


def advised_program(asked: AskedProgram, words: Sequence[str]) -> tuple[Advice, Subject]:
    """The advice on a program, and what it is about.

    Raises:
        MemscopeError: what is asked or the command line cannot be used, or the program cannot be simulated.
    """
    program = resolve_program(words)
    file = asked.device_file
    device = get_device(asked.device or DEFAULT_DEVICE, load_devices(file) if file else None)
    require_rates(device)
    Assume.parse(asked.assume)
    text = asked.allocator
    settings = AllocatorSettings.from_environment(os.environ) if text is None else AllocatorSettings.parse(text)
    always = Plan.parse(asked.strategies)
    if any(strategy.name == "ckpt" and strategy.config.auto for strategy in always.strategies):
        raise UsageError("ckpt:auto is what memscope advise finds: leave it out of --strategies")
    budget_bytes = budget_of(asked.budget, device, named=asked.device is not None)
    allowed = allowed_names(asked.allow)
    folder = Path(tempfile.mkdtemp(prefix="memscope-advise-"))
    try:
        with shown_progress() as moved:
            runs = _Runs(asked, program, f"{device.name}:{budget_bytes}B", folder, moved)
            advisor = ProgramAdvisor(
                runs, program.name, device, budget_bytes, settings, always, allowed, asked.layer_list
            )
            advice = advisor.advice()
    except MemscopeError:  # it may name a log
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return advice, Subject(device.name, lambda name: _profile(asked, name), program.words)


class _Runs:
    """Runs the program, simulated, with its output in a log; see `RunProgram`."""

    def __init__(self, asked: AskedProgram, program: CommandLine, device: str, folder: Path, moved: Progress) -> None:
        self._asked, self._program, self._device, self._folder, self._moved = asked, program, device, folder, moved
        self._timeout = None if asked.timeout is None else parse_seconds(asked.timeout)
        self._numbers = count(1)

    def __call__(self, plan: str) -> tuple[Trace, Offers | None]:
        asked, number = self._asked, next(self._numbers)
        self._moved(f"run {number}: {plan or 'no strategy'}", number - 1, number)
        scratch = self._folder / f"run-{number}"
        scratch.mkdir()
        request = Request(
            device=self._device,
            simulated=True,
            device_file=None if asked.device_file is None else str(asked.device_file.resolve()),
            allocator=asked.allocator,
            assume=asked.assume,
            steps=_STEPS,
            strategies=plan,
            folder=str(scratch),
            command=self._program.words,
            asks=number == 1,
            layer_list=asked.layer_list,
        )
        log = self._folder / f"run-{number}.log"
        end = launch(self._program, request, log=log, timeout_seconds=self._timeout)
        shutil.rmtree(scratch, ignore_errors=True)
        if end.trace is None:
            assert end.error is not None, "a run without a trace has an error"
            raise end.error
        return end.trace, end.offers


def _profile(asked: AskedProgram, device: str) -> list[object]:
    """`memscope profile …` of the same program, without its command line."""
    words: list[object] = ["memscope", "profile"]
    words += ["--device-file", asked.device_file] if asked.device_file else []
    words += ["--allocator", asked.allocator] if asked.allocator else []
    words += ["--assume", asked.assume] if asked.assume else []
    words += ["--timeout", asked.timeout] if asked.timeout else []
    return [*words, "--device", device]
