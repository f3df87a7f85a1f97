"""`memscope profile`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memscope.advisor.measure.runner import Scene
from memscope.advisor.resolve import is_auto, resolve
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.effects import Run, compare
from memscope.cli.grid import asked_grid, show_grid
from memscope.cli.live import live_panels
from memscope.cli.profile_report import document, print_advice, print_next, print_report, write_page
from memscope.cli.progress import shown_progress
from memscope.cli.target_words import RUNS, settings_of
from memscope.errors import MemscopeError, OutOfDeviceMemory, UsageError
from memscope.runs.plans import Report, RunSpec, check_plans, run_all, run_where_there_is_room, try_all
from memscope.runs.would_free import Remedies, would_free
from memscope.simulation.devices.catalogue import get_device, load_devices
from memscope.strategies import Plan, Strategy
from memscope.trace import Trace
from memscope.workload.target import Target, find_target

__all__ = ["command"]


@click.command("profile")
@click.argument("target")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "-s",
    "--strategies",
    "plans",
    multiple=True,
    metavar="PLAN",
    help="Strategies to apply, such as lora:r=8,amp. Once: each of them alone and all together. "
    "Repeated: each plan as it is.",
)
@click.option(
    "--grid",
    metavar="PLAN",
    help="Table 2: every combination of the strategies of PLAN, each on or off, such as ga:steps=8,amp,lora.",
)
@click.option("--samples", type=click.IntRange(1), help="With --grid: samples of the run that is timed. [default: 200]")
@click.option("--memory", metavar="SIZE", help="With --grid on cuda: let PyTorch take no more than SIZE, such as 40GB.")
@click.option(
    "--table", type=click.Path(path_type=Path), metavar="FILE", help="With --grid: write Table 2 to a .csv or .md file."
)
@click.option(
    "--preset",
    metavar="NAME|PATH",
    help="Preset of the target, or a file or folder it reads one from; the first one if not given. "
    "See: memscope targets.",
)
@click.option(
    "--set",
    "changed",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the target; more may follow as KEY=VALUE.",
)
@click.option(
    "--device",
    help="cuda or cpu for a real run, or what to simulate (see: memscope devices). "
    "Default: cuda where PyTorch has a GPU, else gpu.",
)
@click.option(
    "--device-file", type=click.Path(path_type=Path), metavar="FILE", help="TOML file with devices of your own."
)
@click.option(
    "--allocator",
    metavar="CONF",
    help="Settings of PyTorch's allocator, as in PYTORCH_CUDA_ALLOC_CONF, which is the default.",
)
@click.option("--simulate", is_flag=True, help="Simulate also where the run could be real: with --device cpu.")
@click.option(
    "--steps",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Optimizer steps; effects are read from the second.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Where traces and page go; a new folder."
)
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Where the page goes, if not into that folder."
)
@click.option("-f", "--force", is_flag=True, help="Overwrite files that exist.")
@click.option("--live", is_flag=True, help="While runs go, show their memory by category in the terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(
    target: str,
    settings: tuple[str, ...],
    plans: tuple[str, ...],
    grid: str | None,
    samples: int | None,
    memory: str | None,
    table: Path | None,
    preset: str | None,
    changed: tuple[str, ...],
    device: str | None,
    device_file: Path | None,
    allocator: str | None,
    simulate: bool,
    steps: int,
    output: Path | None,
    html: Path | None,
    force: bool,
    live: bool,
    as_json: bool,
    debug: bool,
) -> int:
    """Run TARGET plain and with strategies, show where the memory goes and what each strategy changes.

    TARGET is a folder with target.py, a Python file, or a target that comes with memscope (see: memscope targets).
    Without a GPU the steps are simulated: no weights are loaded and nothing is computed, but every allocation is seen.
    Exit code 4: the last of the runs does not fit on the device. What each strategy it lacks would free is simulated.
    With --grid a combination that does not fit is a result like any other.
    """
    words = settings_of([*changed, *settings])
    device = device or _default_device(simulate)
    simulated = _is_simulated(device, device_file, simulate)
    AllocatorSettings.parse(allocator or "")
    folder = _folder(output, target)
    scene = Scene(target, preset, words, device, device_file, allocator)
    asked = asked_grid(grid, plans, samples, memory, table, device, force)
    parsed = [asked.plans[-1]] if asked else [_resolved(Plan.parse(text), scene, folder, force) for text in plans]
    labels = asked.labels if asked else _labels(parsed)
    found = find_target(target)
    config = found.configure(preset, words)
    check_plans(found, config, asked.plans if asked else parsed)
    html = html or folder / "report.html"
    paths = [folder / f"{_file_name(label)}.npz" for label in labels]
    _refuse_existing([*paths, html], force)
    if html.parent != folder and not html.parent.is_dir():
        raise UsageError(f"{html}: there is no folder {html.parent}: make it, or choose another file with --html")
    stderr = Console(stderr=True)
    live = live and stderr.is_terminal and not as_json  # else there is nobody to look at a panel
    specs = [
        RunSpec(
            target=target,
            preset=preset,
            settings=words,
            plan="" if label == "baseline" else label,
            compared=tuple(map(str, parsed)),
            device=device,
            device_file=device_file,
            allocator=allocator,
            simulated=simulated,
            steps=steps,
            path=path.with_suffix(".part.npz"),
            memory_bytes=asked.memory_bytes if asked else None,
            live=live,
        )
        for label, path in zip(labels, paths, strict=True)
    ]
    with _kept_if_filled(folder):
        for spec in specs:
            spec.path.unlink(missing_ok=True)  # a profile that was killed may have left it
        try:
            with live_panels(labels, stderr) if live else _progress(labels) as report:
                (run_where_there_is_room if asked else run_all)(specs, report)
            for spec, path in zip(specs, paths, strict=True):
                path.unlink(missing_ok=True)  # what is there is of an earlier run
                if spec.path.exists():
                    spec.path.replace(path)
        finally:
            for spec in specs:
                spec.path.unlink(missing_ok=True)
    baselines = _asked_of_baseline(parsed)
    if asked:
        show_grid(asked, paths, html, baselines, overwrite=force, as_json=as_json)
        return 0
    traces = [Trace.load(path) for path in paths]
    runs = [Run(label, trace, _textbook(label)) for label, trace in zip(labels, traces, strict=True)]
    table1 = compare(traces[0], runs[1:])
    write_page(runs, table1, baselines, html, overwrite=force)
    does_not_fit = bool(traces[-1].meta.get("out_of_memory"))
    console = Console(highlight=False)
    if not as_json:
        print_report(console, runs, table1, baselines)
    advice = _advice(found, config, replace(specs[-1], live=False), traces[-1]) if does_not_fit else None
    if as_json:
        click.echo(json.dumps(document(target, runs, paths, table1, advice), ensure_ascii=False, indent=2))
    else:
        if advice:
            print_advice(console, labels[-1], advice)
        print_next(console, folder, html)
    return OutOfDeviceMemory.exit_code if does_not_fit else 0


def _resolved(plan: Plan, scene: Scene, folder: Path, force: bool) -> Plan:
    """The plan with `ckpt:auto` replaced by a checkpoint plan, which is written into the folder."""
    if not is_auto(plan):
        return plan
    if scene.device == "cuda":
        raise UsageError(
            "ckpt:auto is planned for a simulated GPU: plan with memscope advise, then give ckpt:plan=FILE"
        )
    device = get_device(scene.device, load_devices(scene.device_file) if scene.device_file else None)
    with _kept_if_filled(folder), shown_progress() as progress:
        return resolve(plan, scene, device, folder / "checkpoints.json", progress, overwrite=force)


def _default_device(simulate: bool) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and not simulate else "gpu"


def _is_simulated(device: str, file: Path | None, simulate: bool) -> bool:
    if device == "cuda":
        if simulate:
            raise UsageError(
                '"cuda" is the GPU of this machine and cannot be simulated: '
                "name what to simulate, --device gpu or one of memscope devices"
            )
        from memscope.hooks.device import require_gpu

        require_gpu()
        return False
    return simulate or get_device(device, load_devices(file) if file else None).kind != "cpu"


def _labels(plans: list[Plan]) -> list[str]:
    """Runs to make: the baseline, then each strategy of one plan alone and all together, or each of several plans."""
    if len(plans) == 1 and len(plans[0].strategies) > 1:
        plans = [*(Plan.of(strategy) for strategy in plans[0].strategies), plans[0]]
    labels = ["baseline", *(str(plan) for plan in plans if plan)]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UsageError(f'plan "{twice[0]}" is given twice: there is nothing to compare')
    return labels


def _asked_of_baseline(plans: list[Plan]) -> list[str]:
    """What strategies ask of the run without them: the docstring of their `baseline`."""
    asking = {
        s.name: type(s).baseline for plan in plans for s in plan.strategies if type(s).baseline is not Strategy.baseline
    }
    return [f"{(baseline.__doc__ or '').strip().rstrip('.')} ({name})" for name, baseline in sorted(asking.items())]


def _textbook(label: str) -> dict[str, str]:
    strategies: tuple[Strategy, ...] = () if label == "baseline" else Plan.parse(label).strategies
    return dict(strategies[0].textbook) if len(strategies) == 1 else {}


def _folder(output: Path | None, target: str) -> Path:
    if output is None:
        return RUNS / f"{Path(target).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: -o takes a folder, for example -o runs/first")
    return output


@contextlib.contextmanager
def _kept_if_filled(folder: Path) -> Iterator[None]:
    """Make a folder, and take it away again if nothing came into it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder}: the folder cannot be made ({error.strerror}): choose another one with -o"
        ) from error
    try:
        yield
    finally:
        for path in new:
            if not any(path.iterdir()):
                path.rmdir()


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+=" else "_" for c in label.replace(",", "+"))


def _refuse_existing(paths: list[Path], force: bool) -> None:
    existing = [path for path in paths if path.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UsageError(f"{existing[0]}{more} exists already: choose another folder with -o, or overwrite with -f")


def _advice(target: Target, config: Any, spec: RunSpec, trace: Trace) -> Remedies:
    """What would help a run that does not fit; a failure to find out does not take away the runs."""
    try:
        return would_free(target, config, spec, trace, _try_all)
    except MemscopeError as error:
        return Remedies(failed={"what would help": str(error)})


def _try_all(specs: Sequence[RunSpec], labels: Sequence[str]) -> list[str]:
    with _progress(labels) as report:
        return try_all(specs, report)


@contextlib.contextmanager
def _progress(labels: Sequence[str]) -> Iterator[Report]:
    """A bar for each run, on stderr."""
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
