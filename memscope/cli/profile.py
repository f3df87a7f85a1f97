"""`memscope profile`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memscope.advisor.measure.runner import Scene
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.effects import Run, compare
from memscope.cli.grid import AskedGrid, asked_grid, show_grid
from memscope.cli.live import live_panels
from memscope.cli.next_command import compare_words, print_next, profile_words
from memscope.cli.profile_options import DEFAULT_STEPS, ProfileOptions
from memscope.cli.profile_program import profile_program
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
from memscope.command.options import with_options
from memscope.command.output import Attempt, errors_told_last, require_writable
from memscope.command.program_words import TakesProgram, given_program
from memscope.command.progress import shown_progress
from memscope.command.target_words import settings_of
from memscope.errors import MemscopeError, OutOfDeviceMemory, TraceFileError, UsageError
from memscope.runs.checks import check_plans
from memscope.runs.plans import Report, RunSpec, run_all, run_where_there_is_room, try_all
from memscope.runs.would_free import Remedies, would_free
from memscope.simulation.devices.catalogue import get_device, load_devices
from memscope.strategies import Plan
from memscope.trace import Trace
from memscope.units import parse_seconds

__all__ = ["command"]

_TO_TRY = ("lora,amp", "lora", "ckpt")
"""Plans that are proposed after a profile without any: the first that the target can take."""


@click.command("profile", cls=TakesProgram)
@with_options(ProfileOptions)
def command(options: ProfileOptions) -> int:
    """Run TARGET with and without strategies; show where the memory goes and what each strategy changes.

    TARGET is a folder with target.py, a Python file, or a target that comes with memscope (see: memscope targets).
    After --, COMMAND is the command line of a training program, such as python train.py --lr 1e-4: it runs unchanged,
    and ends after --steps.

    Without a GPU the steps are simulated: nothing is loaded or computed, but every allocation is traced. Exit code 4:
    the last run does not fit on the device; memscope then simulates what each further strategy would free.
    With --grid a combination that does not fit is a result like any other.
    """
    program = given_program()
    if program is not None:
        return profile_program(options, program)
    _check_target_options(options)
    with run_folder(options.output, options.target) as folder, errors_told_last() as attempt:
        return _profile(options, _prepared(options, folder), attempt)


def _check_target_options(options: ProfileOptions) -> None:
    if not options.target:
        raise UsageError(
            "profile what? Name a target (see: memscope targets), or a program after --, for example "
            "memscope profile -- python train.py"
        )
    if options.steps is None:
        raise UsageError("--steps all is for programs (-- python train.py): give the number of steps of a target")
    if options.quiet:
        raise UsageError("--quiet is for programs (-- python train.py): a target's output goes to stderr")


def _profile(options: ProfileOptions, prepared: _Prepared, attempt: Attempt) -> int:
    """Carry out the runs, show and write what they tell, and return the exit code."""
    stderr = Console(stderr=True)
    live = options.live and stderr.is_terminal and not options.as_json  # panels need a terminal
    specs = _specs(options, prepared, live)
    labels = prepared.labels
    with live_panels(labels, stderr) if live else _run_bars(labels) as report:
        results = _carry_out(specs, prepared, report, attempt, force=options.force)
    baselines = asked_of_baseline(prepared.plans)
    if prepared.grid:
        found = list(zip(prepared.traces, results, strict=True))
        show_grid(prepared.grid, found, prepared.page, baselines, attempt, options.as_json)
        return 0
    paths = [path for path, result in zip(prepared.traces, results, strict=True) if isinstance(result, Trace)]
    runs = [Run(label, r, textbook_of(label)) for label, r in zip(labels, results, strict=True) if isinstance(r, Trace)]
    table = compare(runs[0].trace, runs[1:])
    page = prepared.page if attempt(write_page, runs, table, baselines, prepared.page) else None
    last = results[-1]
    does_not_fit = isinstance(last, Trace) and bool(last.meta.get("out_of_memory"))
    console = Console(highlight=False)
    if not options.as_json:
        print_report(console, runs, table, baselines)
    remedies = _remedies(replace(specs[-1], live=False), last) if isinstance(last, Trace) and does_not_fit else None
    if options.as_json:
        told = document(options.target, runs, paths, table, remedies)
        click.echo(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        if remedies:
            print_remedies(console, labels[-1], remedies)
        print_places(console, prepared.folder, page)
        print_next(console, _next(options, prepared, paths, remedies))
    return OutOfDeviceMemory.exit_code if does_not_fit else 0


@dataclass(frozen=True)
class _Prepared:
    """The runs of a profile, checked."""

    scene: Scene
    simulated: bool
    plans: list[Plan]
    to_try: list[str]
    """The plans of `_TO_TRY` that the target can take; empty if plans were given."""
    grid: AskedGrid | None
    labels: list[str]
    folder: Path
    page: Path

    @property
    def traces(self) -> list[Path]:
        """The trace file of each run."""
        return [self.folder / f"{file_name(label)}.npz" for label in self.labels]


def _prepared(options: ProfileOptions, folder: Path) -> _Prepared:
    """Find everything that is wrong with the options before anything runs."""
    words = settings_of([*options.changed, *options.settings], trust_remote_code=options.trust_remote_code)
    device = options.device or _default_device(options.simulate)
    simulated = _is_simulated(device, options.device_file, options.simulate)
    version = AllocatorSettings.parse(options.allocator or "").version
    if version is not None and not simulated:
        raise UsageError(
            f"allocator setting version:{version}: a measured run has the allocator of the installed PyTorch; simulate "
            "it, with --simulate or --device"
        )
    check_assume(options.assume, simulated)
    timeout = None if options.timeout is None else parse_seconds(options.timeout)
    file, allocator = options.device_file, options.allocator
    scene = Scene(options.target, options.preset, words, device, file, allocator, timeout, options.assume)
    grid = asked_grid(options, device)
    plans = [grid.combinations[-1].plan] if grid else [Plan.parse(text) for text in options.plans]
    labels = grid.labels if grid else labels_of(plans)
    to_try: list[str] = []
    if grid:
        for varied, combined in grid.plans:
            _checked(_with_settings(scene, varied), combined)
    else:
        to_try = _checked(scene, [plan for plan in plans if not is_auto(plan)], [] if plans else _TO_TRY)
    if any(map(is_auto, plans)):
        with contextlib.redirect_stdout(sys.stderr):
            plans = [_resolved(plan, scene, folder, options.force) for plan in plans]
        _checked(scene, plans)
        labels = labels_of(plans)
    page = options.html or folder / "report.html"
    prepared = _Prepared(scene, simulated, plans, to_try, grid, labels, folder, page)
    refuse_existing([*prepared.traces, page], options.force)
    if page.parent != folder:
        require_writable(page, overwrite=options.force, option="--html")
    return prepared


def _checked(scene: Scene, plans: Sequence[Plan], offered: Sequence[str] = ()) -> list[str]:
    """Check the target and plans; return those of the offered plans that it can take."""
    words = scene.target, scene.preset, scene.settings
    return check_plans(*words, plans, offered=offered, timeout_seconds=scene.timeout_seconds)


def _with_settings(scene: Scene, varied: Mapping[str, str]) -> Scene:
    """The scene with the values of settings that vary."""
    for key in varied:
        if key in scene.settings:
            raise UsageError(f'--vary {key}=…: "{key}" is set already, to "{scene.settings[key]}": leave one out')
    return replace(scene, settings={**scene.settings, **varied})


def _specs(options: ProfileOptions, prepared: _Prepared, live: bool) -> list[RunSpec]:
    """The runs."""
    scene, grid = prepared.scene, prepared.grid
    plans = ["" if label == "baseline" else label for label in prepared.labels]
    cases = [(scene, plan) for plan in plans]
    if grid:
        cases = [(_with_settings(scene, one.settings), str(one.plan)) for one in grid.combinations]
    return [
        RunSpec(
            target=scene.target,
            preset=scene.preset,
            settings=case.settings,
            plan=plan,
            compared=tuple(map(str, prepared.plans)),
            device=scene.device,
            device_file=scene.device_file,
            allocator=scene.allocator,
            simulated=prepared.simulated,
            steps=options.steps or DEFAULT_STEPS,
            assume=scene.assume,
            path=path,
            memory_bytes=grid.memory_bytes if grid else None,
            live=live,
            timeout_seconds=scene.timeout_seconds,
        )
        for (case, plan), path in zip(cases, prepared.traces, strict=True)
    ]


def _carry_out(
    specs: Sequence[RunSpec], prepared: _Prepared, report: Report, attempt: Attempt, *, force: bool
) -> list[Trace | MemscopeError]:
    """Carry out the runs, leave the trace of each that succeeded at its path, and return the traces or their errors.

    In a grid a combination that does not fit is no failure. Other errors are noted.

    Raises:
        MemscopeError: runs failed without which there is nothing to show; the traces of the others are kept.
    """
    with scratch_in(prepared.folder) as scratch:
        parts = [replace(spec, path=scratch / spec.path.name) for spec in specs]
        ended = (run_where_there_is_room if prepared.grid else run_all)(parts, report)
        results: list[Trace | MemscopeError] = [MemscopeError("it was stopped because another run failed")] * len(specs)
        for index, trace in ended.traced.items():
            results[index] = trace or Trace.load(parts[index].path)
        for index, error in ended.failed.items():
            results[index] = error
        refuse_existing(prepared.traces, force)  # another profile may have written them meanwhile
        for part, path, result in zip(parts, prepared.traces, results, strict=True):
            attempt(_keep, part.path, path, result)
    failed = {
        index: error
        for index, error in sorted(ended.failed.items())
        if not (prepared.grid and isinstance(error, OutOfDeviceMemory))
    }
    for index, error in failed.items():
        attempt.note(named_error(error, prepared.labels[index]) if len(specs) > 1 else error)
    needed = results if prepared.grid else results[:1]
    if failed and not any(isinstance(result, Trace) for result in needed):
        kept = [path.name for path, result in zip(prepared.traces, results, strict=True) if isinstance(result, Trace)]
        if kept:
            attempt.note(MemscopeError(f"the traces of the other runs are in {prepared.folder}: {', '.join(kept)}"))
        attempt.raise_noted()
    return results


def _keep(part: Path, path: Path, result: Trace | MemscopeError) -> None:
    """Move the trace of a run to its place. One that its process could not write is written there.

    A run that had no room for its weights has no trace: that of an earlier run is removed.
    """
    try:
        if isinstance(result, OutOfDeviceMemory):
            path.unlink(missing_ok=True)
        elif isinstance(result, Trace) and part.exists():
            part.replace(path)
        elif isinstance(result, Trace):
            result.save(path, overwrite=True)
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be written ({error.strerror})") from error


def _next(
    options: ProfileOptions, prepared: _Prepared, traces: Sequence[Path], remedies: Remedies | None
) -> list[object]:
    """The next command: a plan that fits, a plan to try, or the difference between the first and the last run."""
    words: list[object] = [*profile_words(prepared.scene)]
    words += ["--simulate"] if options.simulate else []
    words += ["--steps", options.steps] if options.steps != DEFAULT_STEPS else []
    words += ["--timeout", options.timeout] if options.timeout else []
    plan = prepared.plans[-1] if prepared.plans else Plan.of()
    if remedies and remedies.best:
        return [*words, "--strategies", Plan.of(*plan.strategies, remedies.best.strategy)]
    if prepared.to_try and not remedies:
        return [*words, "--strategies", prepared.to_try[0]]
    return compare_words(traces)


def _resolved(plan: Plan, scene: Scene, folder: Path, force: bool) -> Plan:
    """The plan, with `ckpt:auto` replaced by a checkpoint plan that is written into the folder."""
    from memscope.advisor.resolve import resolve  # imports torch

    if not is_auto(plan):
        return plan
    if scene.device == "cuda":
        raise UsageError(
            "ckpt:auto makes its plan for a simulated GPU: run memscope advise, then use its plan, ckpt:plan=FILE"
        )
    device = get_device(scene.device, load_devices(scene.device_file) if scene.device_file else None)
    with shown_progress() as moved:
        return resolve(plan, scene, device, folder / "checkpoints.json", moved, overwrite=force)


def _default_device(simulate: bool) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and not simulate else "gpu"


def _is_simulated(device: str, file: Path | None, simulate: bool) -> bool:
    if device == "cuda":
        if simulate:
            raise UsageError(
                '"cuda" is the GPU of this machine and cannot be simulated: '
                "choose --device gpu, or another device of memscope devices"
            )
        from memscope.hooks.device import require_gpu

        require_gpu()
        return False
    return simulate or get_device(device, load_devices(file) if file else None).kind != "cpu"


def _remedies(spec: RunSpec, trace: Trace) -> Remedies:
    """What would help a run that does not fit; if that cannot be found out, the runs stand."""
    try:
        return would_free(spec, trace, _try_all)
    except MemscopeError as error:
        return Remedies(failed={"what would help": str(error)})


def _try_all(specs: Sequence[RunSpec], labels: Sequence[str]) -> list[str]:
    with _run_bars(labels) as report:
        return try_all(specs, report)


@contextlib.contextmanager
def _run_bars(labels: Sequence[str]) -> Iterator[Report]:
    """A progress bar for each run, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("micro-batches"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = [bars.add_task(label, total=None) for label in labels]
        yield lambda index, done, total, state: bars.update(tasks[index], completed=done, total=total)
