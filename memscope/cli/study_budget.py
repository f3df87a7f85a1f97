"""`memscope study budget`."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.cli.next_command import print_next
from memscope.cli.tables import print_table
from memscope.command.options import CHANGED, DEVICE_FILE, FILE, PRESET, argument, option, with_options
from memscope.command.output import errors_told_last, require_writable
from memscope.command.progress import shown_progress
from memscope.command.target_words import settings_of, words_of
from memscope.errors import GateFailed, UsageError
from memscope.simulation.devices.catalogue import get_device, load_devices
from memscope.strategies import Plan
from memscope.studies.budget import BudgetQuestion, Optimum, Spent, TimeBudget, spend
from memscope.units import format_bytes, format_seconds, parse_seconds

__all__ = ["command"]


@dataclass(frozen=True)
class BudgetOptions:
    """The options of `memscope study budget`."""

    target: Annotated[str, argument()]
    settings: Annotated[tuple[str, ...], argument(nargs=-1, metavar="[KEY=VALUE]...")]
    time: Annotated[str, option("--time", required=True, metavar="TIME", help="The budget, such as 3h or 90min.")]
    device: Annotated[str, option("--device", required=True, metavar="NAME", help="See: memscope devices.")]
    device_file: Annotated[Path | None, DEVICE_FILE]
    strategies: Annotated[
        str,
        option(
            "-s", "--strategies", default="amp:dtype=bf16", show_default=True, metavar="PLAN",
            help="Strategies to apply.",
        ),
    ]  # fmt: skip
    vary: Annotated[
        str,
        option(
            "--vary", default="n_layers=12/18/24", show_default=True, metavar="KEY=A/B/…",
            help="The setting that changes the size of the model, and its values.",
        ),
    ]  # fmt: skip
    batches: Annotated[
        str, option("--batches", default="16/33/66", show_default=True, metavar="A/B/…", help="Micro-batches to try.")
    ]
    preset: Annotated[str | None, PRESET]
    changed: Annotated[tuple[str, ...], CHANGED]
    html: Annotated[Path | None, option("--html", type=FILE, metavar="FILE", help="Also write a page with a figure.")]
    force: Annotated[bool, option("-f", "--force", is_flag=True, help="Overwrite an existing page.")]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document instead of a table.")]


@click.command("budget")
@with_options(BudgetOptions)
def command(options: BudgetOptions) -> int:
    """Say what a budget of time buys for TARGET on a device, over sizes of the model and of the batch.

    Step times are estimates (see: docs/read-the-tables.md). Tokens, parameters and expected loss stand against the
    compute-optimal model of Hoffmann et al. (Chinchilla), which has 20 tokens for each parameter. Exit code 3: nothing
    fits the device.
    """
    if options.html:
        require_writable(options.html, overwrite=options.force, option="--html")
    question = _question(options)
    question.require_rates()
    with contextlib.redirect_stdout(sys.stderr), shown_progress() as progress:
        found = spend(question, progress)
    following = _next_words(found)
    with errors_told_last() as attempt:
        has_page = False
        if options.html:
            from memscope.dashboards.budget_page import write_budget_page

            has_page = attempt(write_budget_page, found, options.html, shlex.join(following), overwrite=options.force)
        if options.as_json:
            click.echo(json.dumps(found.document(), ensure_ascii=False, indent=2))
        else:
            console = Console(highlight=False)
            _print(console, found)
            if has_page:
                console.print(Text(f"Page: {options.html}"), soft_wrap=True)
            print_next(console, following)
    return 0 if found.best else GateFailed.exit_code


def _question(options: BudgetOptions) -> BudgetQuestion:
    """Find everything that is wrong with the options before anything is simulated."""
    added = load_devices(options.device_file) if options.device_file else {}
    key, equal, values = options.vary.partition("=")
    if not equal or not key or not all(values.split("/")):
        raise UsageError(f'--vary "{options.vary}": expected a setting and its values, such as n_layers=12/18/24')
    batches = options.batches.split("/")
    if not all(text.isdecimal() and int(text) for text in batches):
        raise UsageError(f'--batches "{options.batches}": expected whole numbers from 1, such as 16/33/66')
    return BudgetQuestion(
        target=options.target,
        preset=options.preset,
        settings=settings_of([*options.changed, *options.settings]),
        vary=key,
        sizes=list(dict.fromkeys(values.split("/"))),
        batches=list(dict.fromkeys(map(int, batches))),
        strategies=str(Plan.parse(options.strategies)),
        device=get_device(options.device, added),
        seconds=parse_seconds(options.time),
    )


def _print(console: Console, found: TimeBudget) -> None:
    asked = found.question
    table = Table(title=f"{asked.seconds / 3600:.3g} h on {asked.device.name}")
    for heading in (asked.vary, "parameters", "micro-batch", "memory", "step", "iterations", "tokens", "MFU", "loss"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        table.add_row(*_cells(row), style="bold" if row is found.best else None)
    print_table(console, table)
    best, peak = found.best, found.at_peak
    if best is None:
        console.print("Nothing fits the device: try smaller --batches, or -s with ckpt.")
    else:
        optimum = Optimum(best.flops)
        console.print(
            f"Smallest expected loss: {asked.vary}={best.size}, micro-batch {best.micro_batch}: "
            f"{_count(best.parameters)} parameters, {_count(best.tokens)} tokens. Compute-optimal with as many "
            f"operations: {_count(optimum.parameters)} parameters, {_count(optimum.tokens)} tokens."
        )
    console.print(
        f"Bound: at the device's 16-bit peak for the whole time, {_count(peak.parameters)} parameters and "
        f"{_count(peak.tokens)} tokens. Step times are estimates; loss is Chinchilla's law, for comparison."
    )


def _cells(row: Spent) -> list[str]:
    memory = format_bytes(row.needed_bytes)
    size = [row.size, _count(row.parameters), f"{row.micro_batch:,}"]
    if not row.fits:
        return [*size, "does not fit", *["–"] * 5]
    spent = [f"{row.iterations:,}", _count(row.tokens), f"{row.mfu:.1%}", f"{row.loss:.3f}" if row.tokens else "–"]
    return [*size, memory, format_seconds(row.step_seconds), *spent]


def _count(number: float) -> str:
    """`166 M`, `3.40 B`."""
    scale, letter = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / scale:.3g} {letter}"


def _next_words(found: TimeBudget) -> list[str]:
    asked, best = found.question, found.best
    row = best or min(found.rows, key=lambda row: row.needed_bytes)
    settings = asked.settings | {asked.vary: row.size, "micro_batch": str(row.micro_batch)}
    words = ["memscope", "profile", *words_of(asked.target, asked.preset, settings), "--device", asked.device.name]
    return [*words, *(["-s", asked.strategies] if asked.strategies else [])]
