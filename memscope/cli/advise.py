"""`memscope advise`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from itertools import count
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from memscope.advisor.advice import Advice
from memscope.advisor.advise import DEFAULT_DEVICE, AdviceRequest, advised, budget_of
from memscope.advisor.emit import emit
from memscope.advisor.measure.runner import Asker, Scene, side_by_side
from memscope.allocator.settings import AllocatorSettings
from memscope.cli.advise_options import PLAN_FILE, AdviseOptions
from memscope.cli.advise_program import Subject, advised_program
from memscope.cli.advise_report import print_advice
from memscope.cli.next_command import print_next, profile_words
from memscope.command.options import with_options
from memscope.command.output import Attempt, errors_told_last, require_writable
from memscope.command.program_words import TakesProgram, given_program
from memscope.command.progress import shown_progress
from memscope.command.target_words import last_profiled, settings_of
from memscope.errors import GateFailed
from memscope.interrupts import INTERRUPTED, interrupts_raised
from memscope.runs.checks import check_plans
from memscope.simulation.assumptions import Assume
from memscope.simulation.devices.catalogue import get_device, load_devices
from memscope.strategies import Plan
from memscope.units import at_least, parse_seconds

__all__ = ["command"]


@click.command("advise", cls=TakesProgram)
@with_options(AdviseOptions)
def command(options: AdviseOptions) -> int:
    """Find the cheapest plan that makes TARGET fit a budget: strategies, and which layers to checkpoint.

    TARGET is as for `memscope profile`; the default is the target last profiled in this folder, or else targets/llama2.
    Combinations of strategies are simulated, and so is the plan that is printed. Times are estimates. Exit code 3:
    no plan was found that fits.
    After --, COMMAND is the command line of a training program, as for `memscope profile`. It is run again, simulated,
    for each plan that is tried.
    """
    program = given_program()
    output = options.output or _new_file(overwrite=options.force)
    require_writable(output, overwrite=options.force)
    if options.html:
        require_writable(options.html, overwrite=options.force, option="--html")
    if program is not None:
        advice, subject = advised_program(options, program)
        interrupted = False
    else:
        advice, subject, interrupted = _advised(options)
    with errors_told_last() as attempt:
        _show(options, advice, subject, output, attempt)
    if interrupted:
        return INTERRUPTED
    return 0 if advice.feasible else GateFailed.exit_code


def _new_file(*, overwrite: bool) -> Path:
    """`PLAN_FILE` in this folder, numbered if there is one that must not be overwritten."""
    file = Path(PLAN_FILE)
    numbered = (file.with_stem(f"{file.stem}-{number}") for number in count(2))
    return file if overwrite or not file.exists() else next(path for path in numbered if not path.exists())


def _show(options: AdviseOptions, advice: Advice, subject: Subject, output: Path, attempt: Attempt) -> None:
    """Write the plan and the page, and print the advice, whatever cannot be written."""
    is_complete = True
    if advice.feasible and advice.layers:
        is_complete = attempt(advice.save, output, overwrite=options.force)
        advice = dataclasses.replace(advice, file=output) if is_complete else advice
    elif advice.feasible and options.force:
        output.unlink(missing_ok=True)  # the plan of an earlier run: this one checkpoints nothing
    has_page = False
    if options.html:
        from memscope.dashboards.plan_page import write_plan_page

        following = shlex.join(map(str, _next_words(options, advice, subject))) if is_complete else ""
        has_page = attempt(write_plan_page, advice, options.html, following, overwrite=options.force)
    lines = emit(advice, options.emit) if options.emit else []
    if options.as_json:
        document = advice.document() | ({"emit": lines} if options.emit else {})
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        console = Console(highlight=False)
        print_advice(console, advice, lines)
        if has_page:
            console.print(Text(f"Page: {options.html}"), soft_wrap=True)
        if is_complete:
            print_next(console, _next_words(options, advice, subject))


def _advised(options: AdviseOptions) -> tuple[Advice, Subject, bool]:
    """The advice, what it is about, and whether Ctrl-C ended the search."""
    trusted = options.trust_remote_code
    if options.target is None:
        changed = settings_of(options.changed, trust_remote_code=trusted)
        target, preset, settings = last_profiled(options.preset, changed)
    else:
        target, preset = options.target, options.preset
        settings = settings_of([*options.changed, *options.settings], trust_remote_code=trusted)
    file = options.device_file
    device = get_device(options.device or DEFAULT_DEVICE, load_devices(file) if file else None)
    allocator = AllocatorSettings.asked(options.allocator)
    timeout = None if options.timeout is None else parse_seconds(options.timeout)
    Assume.parse(options.assume)
    scene = Scene(target, preset, settings, device.name, file, options.allocator, timeout, options.assume)
    request = AdviceRequest(
        budget_bytes=budget_of(options.budget, device, named=options.device is not None),
        device=device,
        strategies=Plan.parse(options.strategies),
        allow=options.allow,
        layer_list=options.layer_list,
        allocator=allocator,
    )
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(contextlib.redirect_stdout(sys.stderr))  # what the target prints is no result
        check_plans(target, preset, settings, [request.strategies], timeout_seconds=timeout)
        progress = scopes.enter_context(shown_progress())
        runner = scopes.enter_context(side_by_side(scene))
        interrupted = scopes.enter_context(interrupts_raised())
        advice = advised(request, Asker(runner, progress), scene.build)
    return (
        advice,
        Subject(scene.device, lambda name: profile_words(dataclasses.replace(scene, device=name))),
        interrupted(),
    )


def _next_words(options: AdviseOptions, advice: Advice, subject: Subject) -> list[object]:
    """A profile of the plan on a device with the budget's memory; if nothing fits, advice for a budget that does."""
    program = ["--", *subject.program] if subject.program else []
    if advice.feasible:
        memory = f"{advice.budget_bytes}B" if "%" in options.budget else options.budget.replace(" ", "")
        plan = ["-s", advice.plan] if advice.plan else []
        return [*subject.profile(f"{subject.device}:{memory}"), *plan, *program]
    profile = subject.profile(subject.device)
    words: list[object] = ["memscope", "advise", *profile[2:], "--budget", at_least(advice.minimum_bytes)]
    if options.strategies:
        words += ["-s", options.strategies]
    if options.allow:
        words += ["--allow", ",".join(options.allow)]
    if options.layer_list:
        words += ["--layer-list", options.layer_list]
    return [*words, *program]
