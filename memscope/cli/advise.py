"""`memscope advise`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from memscope.advisor.advise import DEFAULT_DEVICE, advise, budget_of
from memscope.advisor.emit import TOOLS, emit
from memscope.advisor.runner import Scene, side_by_side
from memscope.cli.advise_report import print_advice
from memscope.command.progress import shown_progress
from memscope.command.target_words import last_profiled, settings_of
from memscope.errors import GateFailed, UsageError
from memscope.simulation.allocator_settings import AllocatorSettings
from memscope.simulation.devices import get_device, load_devices
from memscope.strategies.layer_plan import LayerPlan

__all__ = ["command"]


@click.command("advise")
@click.argument("target", required=False)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--budget", required=True, metavar="SIZE", help="What the device must hold: 40GB, 37.3GiB, or 90% of it.")
@click.option(
    "--device",
    help=f"Device whose kernels and rates are assumed (see: memscope devices). Default: {DEFAULT_DEVICE}.",
)
@click.option(
    "--device-file", type=click.Path(path_type=Path), metavar="FILE", help="TOML file with devices of your own."
)
@click.option("-s", "--strategies", "plan", default="", metavar="PLAN", help="Strategies to apply in any case.")
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    metavar="NAME,...",
    help="Strategies that may be used although they change the mathematics, such as lora,bf16. All others may be.",
)
@click.option("--blocks", default="", metavar="NAME", help="List of modules to choose from, such as transformer.h.")
@click.option("--preset", metavar="NAME|PATH", help="Preset of the target; the first one if not given.")
@click.option(
    "--set", "changed", multiple=True, metavar="KEY=VALUE", help="Change a setting of the target; more may follow."
)
@click.option("--allocator", metavar="CONF", help="Settings of PyTorch's allocator, as in PYTORCH_CUDA_ALLOC_CONF.")
@click.option(
    "--emit", "tool", type=click.Choice(TOOLS), help="Also print the lines to paste into another training tool."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Plan file; memscope-plan.json if not given.",
)
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Also write a page with the plan.")
@click.option("-f", "--force", is_flag=True, help="Overwrite files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(
    target: str | None,
    settings: tuple[str, ...],
    budget: str,
    device: str | None,
    device_file: Path | None,
    plan: str,
    allowed: tuple[str, ...],
    blocks: str,
    preset: str | None,
    changed: tuple[str, ...],
    allocator: str | None,
    tool: str | None,
    output: Path | None,
    html: Path | None,
    force: bool,
    as_json: bool,
    debug: bool,
) -> int:
    """Find the plan that makes TARGET fit a budget at the least cost: strategies, and which layers to checkpoint.

    TARGET is what `memscope profile` takes; without one, what was profiled last in this folder, else targets/llama2.
    Every combination of strategies is simulated; the plan printed was simulated as a whole. Times are estimates.
    Exit code 3: nothing fits.
    """
    if target is None:
        target, preset, words = last_profiled(preset, settings_of(changed))
    else:
        words = settings_of([*changed, *settings])
    output = output or Path("memscope-plan.json")
    for path in [output, *([html] if html else [])]:
        _require_writable(path, force)
    chosen = get_device(device or DEFAULT_DEVICE, load_devices(device_file) if device_file else None)
    parsed = None if allocator is None else AllocatorSettings.parse(allocator)
    scene = Scene(target, preset, words, chosen.name, device_file, allocator)
    with shown_progress() as progress, side_by_side(scene) as runner:
        advice = advise(
            scene.build,
            budget=budget_of(budget, chosen, named=device is not None),
            device=chosen,
            strategies=plan,
            allow=_names(allowed),
            blocks=blocks,
            allocator=parsed,
            runner=runner,
            progress=progress,
        )
    if advice.layers and advice.feasible:
        LayerPlan(advice.layers, advice.made_for).save(output, overwrite=force)
        advice = dataclasses.replace(advice, file=output)
    elif advice.feasible:
        output.unlink(missing_ok=True)  # with -f: the plan of an earlier run, and now nothing is checkpointed
    if html:
        from memscope.dashboards.plan_page import write_plan_page

        write_plan_page(advice, html, overwrite=force)
    lines = emit(advice, tool) if tool else []
    if as_json:
        click.echo(json.dumps({**advice.document(), **({"emit": lines} if tool else {})}, ensure_ascii=False, indent=2))
    else:
        print_advice(Console(highlight=False), advice, _profiled(scene), lines, html)
    return 0 if advice.feasible else GateFailed.exit_code


def _profiled(scene: Scene) -> str:
    """What follows `memscope profile`, for the same workload on the same device."""
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
        raise UsageError(f"{path}: there is no folder {path.parent}: make it, or choose another file")
