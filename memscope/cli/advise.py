"""`memscope advise`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from memscope.advisor.advice import Advice
from memscope.advisor.advise import DEFAULT_DEVICE, advise, budget_of
from memscope.advisor.emit import TOOLS, emit
from memscope.advisor.measure.runner import Scene, side_by_side
from memscope.allocator.settings import AllocatorSettings
from memscope.cli.advise_report import print_advice
from memscope.command.progress import shown_progress
from memscope.command.target_words import last_profiled, settings_of
from memscope.errors import GateFailed, UsageError
from memscope.simulation.devices.catalogue import get_device, load_devices
from memscope.strategies.ckpt import LayerPlan

__all__ = ["command"]


@dataclass(frozen=True)
class Options:
    """The words of the command line, as `--help` names them."""

    target: str | None
    settings: tuple[str, ...]
    budget: str
    device: str | None
    device_file: Path | None
    strategies: str
    allow: tuple[str, ...]
    layer_list: str
    preset: str | None
    changed: tuple[str, ...]
    """Of `--set`."""
    allocator: str | None
    emit: str | None
    output: Path
    html: Path | None
    force: bool
    as_json: bool
    debug: bool


_PATH = click.Path(path_type=Path)


@click.command("advise")
@click.argument("target", required=False)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--budget", required=True, metavar="SIZE", help="Memory of the device: 40GB, 37.3GiB, or 90% of it.")
@click.option(
    "--device",
    help=f"Device whose kernels and rates are assumed (see: memscope devices). Default: {DEFAULT_DEVICE}.",
)
@click.option("--device-file", type=_PATH, metavar="FILE", help="TOML file with devices of your own.")
@click.option("-s", "--strategies", default="", metavar="PLAN", help="Strategies that every plan must use.")
@click.option(
    "--allow",
    multiple=True,
    metavar="NAME,...",
    help="Strategies that change the mathematics and may be used, such as lora,bf16. All exact strategies may be used.",
)
@click.option(
    "--layer-list", default="", metavar="NAME", help="List of modules that are the layers, such as transformer.h."
)
@click.option("--preset", metavar="NAME|PATH", help="Preset of the target. Default: its first preset.")
@click.option(
    "--set", "changed", multiple=True, metavar="KEY=VALUE", help="Change a setting of the target. Repeatable."
)
@click.option("--allocator", metavar="CONF", help="Settings of PyTorch's allocator, as in PYTORCH_CUDA_ALLOC_CONF.")
@click.option("--emit", type=click.Choice(TOOLS), help="Also print the plan as settings of another training tool.")
@click.option(
    "-o", "--output", type=_PATH, default="memscope-plan.json", show_default=True, metavar="FILE", help="Plan file."
)
@click.option("--html", type=_PATH, metavar="FILE", help="Also write a page with the plan.")
@click.option("-f", "--force", is_flag=True, help="Overwrite existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(**words: Any) -> int:
    """Find the cheapest plan that makes TARGET fit a budget: strategies, and which layers to checkpoint.

    TARGET is as for `memscope profile`; the default is the target last profiled in this folder, or else targets/llama2.
    Every combination of strategies is simulated, and so is the plan that is printed. Times are estimates. Exit code 3:
    nothing fits.
    """
    options = Options(**words)
    for path in [options.output, *([options.html] if options.html else [])]:
        _require_writable(path, options.force)
    advice, scene = _advised(options)
    if advice.layers and advice.feasible:
        LayerPlan(advice.layers, advice.made_for).save(options.output, overwrite=options.force)
        advice = dataclasses.replace(advice, file=options.output)
    elif advice.feasible:
        options.output.unlink(missing_ok=True)  # the plan of an earlier run: this one checkpoints nothing
    if options.html:
        from memscope.dashboards.plan_page import write_plan_page

        write_plan_page(advice, options.html, overwrite=options.force)
    lines = emit(advice, options.emit) if options.emit else []
    if options.as_json:
        document = advice.document() | ({"emit": lines} if options.emit else {})
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        print_advice(Console(highlight=False), advice, _profiled(scene), lines, options.html)
    return 0 if advice.feasible else GateFailed.exit_code


def _advised(options: Options) -> tuple[Advice, Scene]:
    """The advice, and the workload and device that it is about."""
    if options.target is None:
        target, preset, settings = last_profiled(options.preset, settings_of(options.changed))
    else:
        target, preset = options.target, options.preset
        settings = settings_of([*options.changed, *options.settings])
    file = options.device_file
    device = get_device(options.device or DEFAULT_DEVICE, load_devices(file) if file else None)
    allocator = None if options.allocator is None else AllocatorSettings.parse(options.allocator)
    scene = Scene(target, preset, settings, device.name, file, options.allocator)
    with shown_progress() as progress, side_by_side(scene) as runner:
        advice = advise(
            scene.build,
            budget=budget_of(options.budget, device, named=options.device is not None),
            device=device,
            strategies=options.strategies,
            allow=_names(options.allow),
            layer_list=options.layer_list,
            allocator=allocator,
            runner=runner,
            progress=progress,
        )
    return advice, scene


def _profiled(scene: Scene) -> str:
    """The arguments of `memscope profile` for the same workload on the same device."""
    words = [scene.target]
    if scene.preset is not None:
        words += ["--preset", scene.preset]
    if scene.settings:
        words += ["--set", *(f"{key}={value}" for key, value in scene.settings.items())]
    if scene.device_file is not None:
        words += ["--device-file", str(scene.device_file)]
    if scene.allocator is not None:
        words += ["--allocator", scene.allocator]
    return shlex.join([*words, "--device", scene.device])


def _names(texts: Sequence[str]) -> list[str]:
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def _require_writable(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise UsageError(f"{path} exists already: choose another name, or overwrite it with -f")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: create it, or choose another file")
