"""`memscope fit … -- COMMAND`: whether a training program fits a device, and how much larger its sizes may be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from memscope.advisor.fit.devices import same_kernels
from memscope.advisor.fit.fit import answer
from memscope.advisor.fit.fitting import Fitting, Size
from memscope.advisor.fit.programs import NAMES, ProgramRunner
from memscope.advisor.fit.question import Question
from memscope.advisor.measure.runner import Asker
from memscope.allocator.settings import AllocatorSettings
from memscope.cli.fit_options import FitOptions
from memscope.cli.next_command import machine_words
from memscope.command.program_words import refuse_target
from memscope.command.progress import shown_progress
from memscope.program.command_line import resolve_program
from memscope.program.sizes import SizeOptions, size_options
from memscope.simulation.assumptions import Assume
from memscope.simulation.devices.catalogue import all_devices, get_device, load_devices
from memscope.strategies import Plan
from memscope.units import parse_seconds

__all__ = ["fit_program"]

_OF_TARGETS = {
    "settings": "KEY=VALUE",
    "changed": "--set",
    "preset": "--preset",
    "trust_remote_code": "--trust-remote-code",
    "allow": "--allow",
}
"""Options that a program cannot have, by their fields."""
_OTHER_DEVICES = (
    "Devices with other kernels are not compared: each would run the program once more. Choose one with --device."
)


def fit_program(options: FitOptions, words: Sequence[str]) -> tuple[Fitting, list[object]]:
    """Whether the program fits, and the next command.

    Raises:
        MemscopeError: the options or the command line cannot be used, or the program cannot be simulated as it is.
    """
    refuse_target("fit", options, _OF_TARGETS)
    runner, question = _prepared(options, words)
    with shown_progress() as progress:
        found = answer(question, Asker(runner, progress), None)
    notes = [runner.options.told, _OTHER_DEVICES, *_without_effect(found, runner.options)]
    found = replace(found, notes=(*found.notes, *notes))
    return found, _next(options, runner, found)


def _prepared(options: FitOptions, words: Sequence[str]) -> tuple[ProgramRunner, Question]:
    """Find everything that is wrong with the options before the program runs."""
    added = load_devices(options.device_file) if options.device_file else {}
    device = get_device(options.device, added)
    allocator = AllocatorSettings.asked(options.allocator)
    Assume.parse(options.assume)
    strategies = str(Plan.parse(options.strategies))
    timeout = None if options.timeout is None else parse_seconds(options.timeout)
    program = resolve_program(words)
    found = size_options(program, os.environ, micro_batch=options.batch_option, length=options.length_option)
    runner = ProgramRunner(
        program, found, options.device, options.device_file, options.allocator, options.assume, timeout
    )
    question = Question(
        names=NAMES,
        asked=Size(found.micro_batch.value, found.length.value if found.length else None),
        device=device,
        strategies=strategies,
        allow=(),
        allocator=allocator,
        devices=[one for one in (*all_devices(), *added.values()) if same_kernels(one, device)],
        device_text=options.device,
        grid=options.html is not None,
    )
    return runner, question


def _without_effect(found: Fitting, options: SizeOptions) -> list[str]:
    """A note on an option whose values all need the same memory."""
    asked, notes = found.asked.size, []
    batches = [one for one in found.evidence if one.size.seq_len == asked.seq_len]
    lengths = [one for one in found.evidence if one.size.micro_batch == asked.micro_batch]
    varied = [(options.micro_batch, batches)] + ([(options.length, lengths)] if options.length else [])
    for option, evidence in varied:
        if len(evidence) > 1 and len({one.peak.allocated for one in evidence}) == 1:
            notes.append(
                f"The peak is the same for all values of {option.name}: either it does not set the size, or the data "
                "are too few or too short. Name another option with --batch-option or --length-option."
            )
    return notes


def _next(options: FitOptions, runner: ProgramRunner, found: Fitting) -> list[object]:
    """A profile of the program: with the largest micro-batch that fits, or with activation checkpoints."""
    words: list[object] = ["memscope", "profile", "--device", options.device, *machine_words(options)]
    program, plan = runner.program, found.strategies
    if found.micro_batch.value:
        size = found.asked.size
        program = runner.options.changed(program, found.micro_batch.value, size.seq_len)
    elif not plan:
        plan = "ckpt"
    return [*words, *(["--strategies", plan] if plan else []), "--", *program.words]
