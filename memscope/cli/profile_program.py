"""`memscope profile … -- COMMAND`: a training program, run unchanged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.effects import Run, compare
from memscope.cli.next_command import compare_words, machine_words, print_next
from memscope.cli.profile_options import DEFAULT_STEPS, ProfileOptions
from memscope.cli.profile_report import document, print_places, print_remedies, print_report, write_page
from memscope.cli.profile_runs import (
    asked_of_baseline,
    check_assume,
    file_name,
    is_auto,
    labels_of,
    named_error,
    refuse_existing,
    textbook_of,
)
from memscope.cli.run_folder import run_folder, scratch_in
from memscope.command.output import Attempt, errors_told_last, require_writable
from memscope.command.program_words import refuse_target
from memscope.command.progress import shown_progress
from memscope.errors import MemscopeError, OutOfDeviceMemory, UsageError
from memscope.gpu.nvml import has_gpu
from memscope.program.command_line import CommandLine, resolve_program
from memscope.program.launch import ProgramEnd, StepReport, launch
from memscope.program.request import Offers, Request
from memscope.program.would_help import would_help
from memscope.runs.would_free import Remedies
from memscope.simulation.devices.catalogue import all_devices, get_device, load_devices
from memscope.strategies import Plan
from memscope.trace import Trace
from memscope.units import parse_seconds

__all__ = ["profile_program"]

_OF_TARGETS = {
    "settings": "KEY=VALUE",
    "changed": "--set",
    "preset": "--preset",
    "trust_remote_code": "--trust-remote-code",
    "grid": "--grid",
    "vary": "--vary",
    "samples": "--samples",
    "memory": "--memory",
    "table": "--table",
    "live": "--live",
}
"""Options that a program cannot have, by their fields."""
_TO_TRY = ("ckpt", "lora")
"""Strategies that are proposed after a profile without any: the first that the program can take."""


@dataclass(frozen=True)
class _Asked:
    """The runs of a program, checked."""

    program: CommandLine
    options: ProfileOptions
    device: str
    simulated: bool
    plans: list[Plan]
    labels: list[str]
    timeout_seconds: float | None


def profile_program(options: ProfileOptions, words: Sequence[str]) -> int:
    """Run a program once for each label; show and write what the runs tell, and return the exit code.

    Raises:
        MemscopeError: the options or the command line cannot be used, or the baseline has no trace.
    """
    asked = _asked(options, words)
    with run_folder(options.output, asked.program.name) as folder, errors_told_last() as attempt:
        page = options.html or folder / "report.html"
        paths = {label: folder / f"{file_name(label)}.npz" for label in asked.labels}
        refuse_existing([*paths.values(), page], options.force)
        if page.parent != folder:
            require_writable(page, overwrite=options.force, option="--html")
        ends = _run(asked, folder)
        return _show(asked, ends, paths, page, attempt)


def _asked(options: ProfileOptions, words: Sequence[str]) -> _Asked:
    """Find everything that is wrong with the command line before the program runs."""
    refuse_target("profile", options, _OF_TARGETS)
    device = options.device or ("cuda" if has_gpu() and not options.simulate else "gpu")
    simulated = _is_simulated(device, options)
    if not simulated and AllocatorSettings.parse(options.allocator or "").version is not None:
        raise UsageError(f"--allocator {options.allocator}: a measured run has the allocator of the installed PyTorch")
    check_assume(options.assume, simulated)
    plans = [Plan.parse(text) for text in options.plans]
    if any(map(is_auto, plans)):
        raise UsageError(
            "ckpt:auto searches for a target's checkpoint plan: for a program, run "
            "memscope advise --budget SIZE -- COMMAND"
        )
    timeout = None if options.timeout is None else parse_seconds(options.timeout)
    return _Asked(resolve_program(words), options, device, simulated, plans, labels_of(plans), timeout)


def _is_simulated(device: str, options: ProfileOptions) -> bool:
    if device == "cuda":
        if options.simulate:
            raise UsageError(
                '"cuda" is the GPU of this machine and cannot be simulated: '
                "choose --device gpu, or another device of memscope devices"
            )
        return False
    file = options.device_file
    return options.simulate or get_device(device, load_devices(file) if file else None).kind != "cpu"


def _run(asked: _Asked, folder: Path) -> dict[str, ProgramEnd]:
    """The runs, one after the other; without the baseline's trace there are no others."""
    ends: dict[str, ProgramEnd] = {}
    for label in asked.labels:
        log = folder / f"{file_name(label)}.log" if asked.options.quiet else None
        with scratch_in(folder) as scratch, _steps_shown(asked, label) as report:
            ends[label] = launch(
                asked.program,
                _request(asked, label, scratch),
                log=log,
                timeout_seconds=asked.timeout_seconds,
                keeps_steps=True,
                report=report,
            )
        if ends[label].trace is None and label == "baseline":
            break
    return ends


def _request(asked: _Asked, label: str, scratch: Path) -> Request:
    options = asked.options
    return Request(
        device=asked.device,
        simulated=asked.simulated,
        device_file=None if options.device_file is None else str(options.device_file.resolve()),
        allocator=options.allocator,
        assume=options.assume,
        steps=options.steps,
        strategies="" if label == "baseline" else label,
        folder=str(scratch.resolve()),
        command=asked.program.words,
        asks=asked.simulated and label in ("baseline", asked.labels[-1]),
    )


@contextlib.contextmanager
def _steps_shown(asked: _Asked, label: str) -> Iterator[StepReport]:
    """Show the step that the program is in, on a terminal: as a line that changes, or between the program's own."""
    console = Console(stderr=True, highlight=False)
    total = f" of {asked.options.steps}" if asked.options.steps else ""

    def words(step: int) -> str:
        return f"{label}: step {step}{total}"

    if not console.is_terminal:
        yield lambda step: None
    elif asked.options.quiet:
        with console.status(f"{label}: starting") as status:
            yield lambda step: status.update(words(step))
    else:
        yield lambda step: console.print(f"memscope: {words(step)}", style="dim")


def _show(asked: _Asked, ends: dict[str, ProgramEnd], paths: dict[str, Path], page: Path, attempt: Attempt) -> int:
    """Print and write the results; return the exit code."""
    options = asked.options
    told = _program(asked, ends)
    for label, end in ends.items():
        if end.error is not None:
            attempt.note(named_error(end.error, label) if len(asked.labels) > 1 else end.error)
    traces = {label: end.trace for label, end in ends.items() if end.trace is not None}
    if "baseline" not in traces:
        if options.as_json:
            click.echo(json.dumps(_failed(asked, told, ends["baseline"].error), ensure_ascii=False, indent=2))
        attempt.raise_noted()
    for label, trace in traces.items():
        attempt(trace.save, paths[label], overwrite=True)
    runs = [Run(label, trace, textbook_of(label)) for label, trace in traces.items()]
    last = runs[-1].trace
    table = compare(runs[0].trace, runs[1:])
    written = [paths[label] for label in traces]
    baselines = asked_of_baseline(asked.plans)
    has_page = attempt(write_page, runs, table, baselines, page)
    console = Console(highlight=False)
    if not options.as_json:
        print_report(console, runs, table, baselines)
    does_not_fit = bool(last.meta.get("out_of_memory"))
    remedies = _remedies(asked, ends, runs[-1].label, written[0].parent) if does_not_fit else None
    if options.as_json:
        found = document(asked.program.name, runs, written, table, remedies) | {"program": told}
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        if remedies:
            print_remedies(console, runs[-1].label, remedies)
        print_places(console, written[0].parent, page if has_page else None)
        print_next(console, _next(asked, written, last, ends["baseline"].offers, remedies))
    return OutOfDeviceMemory.exit_code if does_not_fit else 0


def _remedies(asked: _Asked, ends: dict[str, ProgramEnd], label: str, folder: Path) -> Remedies:
    """What would help the last run, which does not fit; if that cannot be found out, the runs stand."""
    try:
        with shown_progress() as moved:
            request = _request(asked, label, folder)
            return would_help(asked.program, request, ends[label], moved, timeout_seconds=asked.timeout_seconds)
    except MemscopeError as error:
        return Remedies(failed={"what would help": str(error)})


def _program(asked: _Asked, ends: dict[str, ProgramEnd]) -> dict[str, Any]:
    """What the JSON document says of the program: its exit code is the first that is not 0."""
    codes = [end.exit_code for end in ends.values()]
    return {"command": list(asked.program.words), "exit_code": next(filter(None, codes), 0)}


def _failed(asked: _Asked, told: dict[str, Any], error: MemscopeError | None) -> dict[str, Any]:
    """The JSON document of a program without results."""
    return {
        "schema_version": 1,
        "target": asked.program.name,
        "device": {"name": asked.device, "simulated": asked.simulated},
        "program": told,
        "error": {"kind": type(error).__name__, "message": str(error)},
    }


def _next(
    asked: _Asked, traces: Sequence[Path], last: Trace, offers: Offers | None, remedies: Remedies | None
) -> list[object]:
    """The next command: a plan that fits, a strategy to try, or what compares or shows the traces.

    A run that was not simulated, and ran out of memory, is simulated on a GPU of the same kind.
    """
    options = asked.options
    device = asked.device if asked.simulated else _same_gpu(last)
    offered = {offer.spec for offer in offers.strategies} if offers else set(_TO_TRY)  # it ended before its optimizer
    to_try = [spec for spec in _TO_TRY if spec in offered]
    plan = asked.plans[-1] if asked.plans else Plan.of()
    best = remedies.best if remedies else None
    fitting = [str(Plan.of(*plan.strategies, best.strategy))] if best else []
    proposed = fitting or ([] if asked.plans or (remedies and remedies.tried) else to_try)
    if device is None or not proposed:
        return compare_words(traces)
    words: list[object] = ["memscope", "profile", "--device", device, *machine_words(options)]
    words += ["--simulate"] if options.simulate else []
    words += ["--steps", options.steps or "all"] if options.steps != DEFAULT_STEPS else []
    words += ["--timeout", options.timeout] if options.timeout else []
    return [*words, "--strategies", proposed[0], "--", *asked.program.words]


def _same_gpu(trace: Trace) -> str | None:
    """The name of the device that simulates the GPU of a run that ran out of memory; None if there is none."""
    if not trace.meta.get("out_of_memory"):
        return None
    given = trace.meta["device"]["name"]
    return next((device.name for device in all_devices() if device.vendor_name == given), None)
