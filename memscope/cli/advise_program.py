"""`memscope advise … -- COMMAND`: a plan for a training program, which is run again for each plan that is tried."""

from __future__ import annotations

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
from memscope.cli.advise_options import AdviseOptions
from memscope.cli.next_command import machine_words
from memscope.command.program_words import refuse_target
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

__all__ = ["Subject", "advised_program"]

_STEPS = 2
"""The second step is the first with optimizer state."""
_OF_TARGETS = {"preset": "--preset", "changed": "--set", "trust_remote_code": "--trust-remote-code"}
"""Options that a program cannot have, by their fields."""


@dataclass(frozen=True)
class Subject:
    """What an advice is about, in words of further commands."""

    device: str
    profile: Callable[[str], Sequence[object]]
    """`memscope profile …` on a device."""
    program: Sequence[str] = ()
    """The program's command line, which follows `--`."""


def advised_program(options: AdviseOptions, words: Sequence[str]) -> tuple[Advice, Subject]:
    """The advice on a program, and what it is about.

    Raises:
        MemscopeError: what is asked or the command line cannot be used, or the program cannot be simulated.
    """
    refuse_target("advise", options, _OF_TARGETS)
    program = resolve_program(words)
    file = options.device_file
    device = get_device(options.device or DEFAULT_DEVICE, load_devices(file) if file else None)
    require_rates(device)
    Assume.parse(options.assume)
    settings = AllocatorSettings.asked(options.allocator)
    always = Plan.parse(options.strategies)
    if any(strategy.name == "ckpt" and strategy.config.auto for strategy in always.strategies):
        raise UsageError("ckpt:auto is what memscope advise finds: leave it out of --strategies")
    budget_bytes = budget_of(options.budget, device, named=options.device is not None)
    allowed = allowed_names(options.allow)
    folder = Path(tempfile.mkdtemp(prefix="memscope-advise-"))
    try:
        with shown_progress() as moved:
            runs = _Runs(options, program, f"{device.name}:{budget_bytes}B", folder, moved)
            advisor = ProgramAdvisor(
                runs, program.name, device, budget_bytes, settings, always, allowed, options.layer_list
            )
            advice = advisor.advice()
    except MemscopeError:  # it may name a log
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return advice, Subject(device.name, lambda name: _profile(options, name), program.words)


class _Runs:
    """Runs the program, simulated, with its output in a log; see `RunProgram`."""

    def __init__(
        self, options: AdviseOptions, program: CommandLine, device: str, folder: Path, moved: Progress
    ) -> None:
        self._options, self._program, self._device, self._folder, self._moved = options, program, device, folder, moved
        self._timeout = None if options.timeout is None else parse_seconds(options.timeout)
        self._numbers = count(1)

    def __call__(self, plan: str) -> tuple[Trace, Offers | None]:
        options, number = self._options, next(self._numbers)
        self._moved(f"run {number}: {plan or 'no strategy'}", number - 1, number)
        scratch = self._folder / f"run-{number}"
        scratch.mkdir()
        request = Request(
            device=self._device,
            simulated=True,
            device_file=None if options.device_file is None else str(options.device_file.resolve()),
            allocator=options.allocator,
            assume=options.assume,
            steps=_STEPS,
            strategies=plan,
            folder=str(scratch),
            command=self._program.words,
            asks=number == 1,
            layer_list=options.layer_list,
        )
        log = self._folder / f"run-{number}.log"
        end = launch(self._program, request, log=log, timeout_seconds=self._timeout)
        shutil.rmtree(scratch, ignore_errors=True)
        if end.trace is None:
            assert end.error is not None, "a run without a trace has an error"
            raise end.error
        return end.trace, end.offers


def _profile(options: AdviseOptions, device: str) -> list[object]:
    """`memscope profile …` of the same program, without its command line."""
    words: list[object] = ["memscope", "profile", *machine_words(options)]
    words += ["--timeout", options.timeout] if options.timeout else []
    return [*words, "--device", device]
