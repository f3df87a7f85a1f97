"""`memscope fit`."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from dataclasses import replace

import click
from rich.console import Console
from rich.text import Text

from memscope.advisor.fit.fit import answer
from memscope.advisor.fit.fitting import Fitting
from memscope.advisor.fit.names import SizeNames, sizes_of_target
from memscope.advisor.fit.question import Question
from memscope.advisor.measure.runner import Asker, Scene, side_by_side
from memscope.allocator.settings import AllocatorSettings
from memscope.cli.fit_options import FitOptions
from memscope.cli.fit_program import fit_program
from memscope.cli.fit_report import print_fit
from memscope.cli.next_command import print_next, profile_words
from memscope.command.options import with_options
from memscope.command.output import errors_told_last, require_writable
from memscope.command.program_words import TakesProgram, given_program
from memscope.command.progress import shown_progress
from memscope.command.target_words import settings_of
from memscope.errors import GateFailed, UsageError
from memscope.runs.checks import check_plans
from memscope.runs.processes import alone
from memscope.simulation.assumptions import Assume
from memscope.simulation.devices.catalogue import all_devices, get_device, load_devices
from memscope.strategies import Plan
from memscope.units import parse_seconds

__all__ = ["command"]


@click.command("fit", cls=TakesProgram)
@with_options(FitOptions)
def command(options: FitOptions) -> int:
    """Say whether TARGET fits a device, how much larger it may be, and which devices hold it.

    TARGET is as for `memscope profile`. After --, COMMAND is the command line of a training program, which runs once
    for each size: it must have its option for the micro-batch, such as --batch-size 8.

    Every answer is simulated, on both sides of the boundary. If the step does not fit, the cheapest changes that make
    it fit are searched; their times are estimates. Exit code 3: it does not fit.
    """
    if options.html:
        require_writable(options.html, overwrite=options.force, option="--html")
    program = given_program()
    found, following = _fit_target(options) if program is None else fit_program(options, program)
    with errors_told_last() as attempt:
        has_page = False
        if options.html:
            from memscope.dashboards.fit_page import write_fit_page

            has_page = attempt(
                write_fit_page, found, options.html, shlex.join(map(str, following)), overwrite=options.force
            )
        if options.as_json:
            click.echo(json.dumps(found.document(), ensure_ascii=False, indent=2))
        else:
            console = Console(highlight=False)
            print_fit(console, found)
            if has_page:
                console.print(Text(f"Page: {options.html}"), soft_wrap=True)
            print_next(console, following)
    return 0 if found.fits else GateFailed.exit_code


def _fit_target(options: FitOptions) -> tuple[Fitting, list[object]]:
    """Whether the target fits, and the next command."""
    if not options.target:
        raise UsageError(
            "what must fit? Name a target (see: memscope targets), or a program after --, for example "
            "memscope fit -- python train.py --batch-size 8"
        )
    if options.batch_option or options.length_option:
        raise UsageError("--batch-option and --length-option are for programs (-- python train.py)")
    scene, question = _prepared(options)
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(contextlib.redirect_stdout(sys.stderr))  # what the target prints is no result
        progress = scopes.enter_context(shown_progress())
        runner = scopes.enter_context(side_by_side(scene))
        found = answer(question, Asker(runner, progress), scene.build)
    return found, _next_words(scene, found, question.names)


def _prepared(options: FitOptions) -> tuple[Scene, Question]:
    """Find everything that is wrong with the options before anything is simulated."""
    settings = settings_of([*options.changed, *options.settings], trust_remote_code=options.trust_remote_code)
    file = options.device_file
    added = load_devices(file) if file else {}
    device = get_device(options.device, added)
    allocator = AllocatorSettings.asked(options.allocator)
    timeout = None if options.timeout is None else parse_seconds(options.timeout)
    Assume.parse(options.assume)
    scene = Scene(
        options.target, options.preset, settings, options.device, file, options.allocator, timeout, options.assume
    )
    with contextlib.redirect_stdout(sys.stderr):
        check_plans(scene.target, scene.preset, settings, [Plan.parse(options.strategies)], timeout_seconds=timeout)
        names = alone(sizes_of_target, scene.target, scene.preset, settings, timeout_seconds=timeout)
    question = Question(
        names=names,
        asked=None,
        device=device,
        strategies=str(Plan.parse(options.strategies)),
        allow=options.allow,
        allocator=allocator,
        devices=(*all_devices(), *added.values()),
        device_text=options.device,
        grid=options.html is not None,
    )
    return scene, question


def _next_words(scene: Scene, found: Fitting, names: SizeNames) -> list[object]:
    """A profile: with the largest micro-batch; or with a change, a micro-batch or a device with which it fits."""
    settings, device, strategies = dict(scene.settings), scene.device, found.strategies
    if found.changes:
        strategies = found.changes[0].strategies
    elif found.micro_batch.value:
        settings[names.micro_batch] = str(found.micro_batch.value)
    elif found.smallest_device:
        device = found.smallest_device.name
    words = profile_words(replace(scene, settings=settings, device=device))
    return [*words, *(["-s", strategies] if strategies else [])]
