"""`memscope profile`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memscope.cli.profile_report import document, print_report, write_page
from memscope.effects import Run, compare
from memscope.errors import OutOfDeviceMemory, UsageError
from memscope.runs import RunSpec, check_plans, run_all
from memscope.simulation.allocator_settings import AllocatorSettings
from memscope.simulation.devices import get_device, load_devices
from memscope.strategies import Plan, Strategy
from memscope.target import find_target
from memscope.trace import Trace

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
    "--preset", metavar="NAME", help="Preset of the target; the first one if not given. See: memscope targets."
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(
    target: str,
    settings: tuple[str, ...],
    plans: tuple[str, ...],
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
    as_json: bool,
    debug: bool,
) -> int:
    """Run TARGET plain and with strategies, show where the memory goes and what each strategy changes.

    TARGET is a folder with target.py, a Python file, or a target that comes with memscope (see: memscope targets).
    Without a GPU the steps are simulated: no weights are loaded and nothing is computed, but every allocation is seen.
    Exit code 4: the last of the runs does not fit on the device.
    """
    words = _words([*changed, *settings])
    device = device or _default_device(simulate)
    simulated = _is_simulated(device, device_file, simulate)
    AllocatorSettings.parse(allocator or "")
    parsed = [Plan.parse(text) for text in plans]
    labels = _labels(parsed)
    found = find_target(target)
    check_plans(found, found.configure(preset, words), parsed)
    folder = _folder(output, target)
    html = html or folder / "report.html"
    paths = [folder / f"{_file_name(label)}.npz" for label in labels]
    _refuse_existing([*paths, html], force)
    if html.parent != folder and not html.parent.is_dir():
        raise UsageError(f"{html}: there is no folder {html.parent}: make it, or choose another file with --html")
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
        )
        for label, path in zip(labels, paths, strict=True)
    ]
    with _kept_if_filled(folder):
        try:
            _run_with_progress(specs, labels)
            for spec, path in zip(specs, paths, strict=True):
                spec.path.replace(path)
        finally:
            for spec in specs:
                spec.path.unlink(missing_ok=True)
    traces = [Trace.load(path) for path in paths]
    runs = [Run(label, trace, _textbook(label)) for label, trace in zip(labels, traces, strict=True)]
    table = compare(traces[0], runs[1:])
    baselines = _asked_of_baseline(parsed)
    write_page(runs, table, baselines, html, overwrite=force)
    if as_json:
        click.echo(json.dumps(document(target, runs, paths, table), ensure_ascii=False, indent=2))
    else:
        print_report(Console(highlight=False), runs, table, baselines, folder, html)
    return OutOfDeviceMemory.exit_code if traces[-1].meta.get("out_of_memory") else 0


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
        from memscope.hooks.snapshot import require_gpu

        require_gpu()
        return False
    return simulate or get_device(device, load_devices(file) if file else None).kind != "cpu"


def _words(texts: Sequence[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    for text in texts:
        key, equal, value = text.partition("=")
        if not equal or not key:
            raise UsageError(
                f'"{text}" is no setting: expected KEY=VALUE, for example n_layers=1. See: memscope targets'
            )
        if key in words:
            raise UsageError(f'setting "{key}" is given twice: "{words[key]}" and "{value}"')
        words[key] = value
    return words


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
        return Path("memscope-runs") / f"{Path(target).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
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


def _run_with_progress(specs: list[RunSpec], labels: list[str]) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("micro-batches"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = [bars.add_task(label, total=None) for label in labels]
        run_all(specs, lambda index, done, total: bars.update(tasks[index], completed=done, total=total))
