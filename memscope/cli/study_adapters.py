"""`memscope study adapters`."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.cli.next_command import print_next
from memscope.cli.tables import print_table
from memscope.command.options import CHANGED, DEVICE_FILE, argument, option, with_options
from memscope.command.progress import shown_progress
from memscope.command.target_words import settings_of, words_of
from memscope.errors import GateFailed, UsageError
from memscope.studies.adapters import Adapter, AdapterCell, AdapterQuestion, AdapterTable, compare_adapters
from memscope.units import format_bytes, format_seconds

__all__ = ["command"]

_ALL = (
    "opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "llama-2-7b", "llama-2-13b",
    "mistral-7b",
)  # fmt: skip
_DEFAULT = ("opt-125m", "opt-1.3b", "llama-2-7b")
_SETTINGS = {"seq_len": "512", "dtype": "fp32"}
"""Settings of `hf:` unless others are given."""


@dataclass(frozen=True)
class AdapterOptions:
    """The options of `memscope study adapters`."""

    settings: Annotated[tuple[str, ...], argument(nargs=-1, metavar="[KEY=VALUE]...")]
    models: Annotated[
        str | None,
        option("--models", metavar="NAME,…", help=f"Models of hf:. [default: {','.join(_DEFAULT)}]"),
    ]
    all_models: Annotated[bool, option("--all", is_flag=True, help="OPT 125m to 30b, LLaMA2 7B and 13B, Mistral 7B.")]
    adapters: Annotated[
        str,
        option(
            "--adapters", default="16/16,64/64,32/16,64/32", show_default=True, metavar="R/ALPHA,…",
            help="Rank and alpha of QLoRA's updates.",
        ),
    ]  # fmt: skip
    devices: Annotated[
        str,
        option(
            "--devices", default="rtx4090,a100-40gb", show_default=True, metavar="NAME,…", help="See: memscope devices."
        ),
    ]
    device_file: Annotated[Path | None, DEVICE_FILE]
    strategies: Annotated[
        str,
        option(
            "-s", "--strategies", default="amp:dtype=bf16", show_default=True, metavar="PLAN",
            help="Strategies of every row, such as amp:dtype=bf16,ckpt.",
        ),
    ]  # fmt: skip
    changed: Annotated[tuple[str, ...], CHANGED]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document instead of a table.")]


@click.command("adapters")
@with_options(AdapterOptions)
def command(options: AdapterOptions) -> int:
    """Compare QLoRA of several ranks with full fine-tuning, for models of several sizes, on several devices.

    Every cell is simulated: the memory that the step needs, whether it fits, and the estimated time of a step.
    KEY=VALUE are settings of hf: for all models; unless given, seq_len=512 and dtype=fp32. Exit code 3: nothing fits.
    """
    question = _question(options)
    with contextlib.redirect_stdout(sys.stderr), shown_progress() as progress:
        found = compare_adapters(question, progress)
    if options.as_json:
        click.echo(json.dumps(found.document(), ensure_ascii=False, indent=2))
    else:
        console = Console(highlight=False)
        _print(console, found)
        print_next(console, _next_words(found))
    return 0 if found.largest_that_fits else GateFailed.exit_code


def _question(options: AdapterOptions) -> AdapterQuestion:
    if options.all_models and options.models is not None:
        raise UsageError("--all and --models both name the models: leave one out")
    question = AdapterQuestion(
        models=_ALL if options.all_models else _DEFAULT if options.models is None else _names(options, "models"),
        adapters=list(dict.fromkeys(map(_adapter, options.adapters.split(",")))),
        devices=_names(options, "devices"),
        device_file=options.device_file,
        settings=_SETTINGS | settings_of([*options.changed, *options.settings]),
        strategies=options.strategies,
    )
    for adapter in (*question.adapters, None):
        question.plan(adapter)
    return question


def _names(options: AdapterOptions, what: str) -> list[str]:
    text = getattr(options, what)
    names = list(dict.fromkeys(text.split(",")))
    if not all(names):
        raise UsageError(f'--{what} "{text}": expected names joined by commas')
    return names


def _adapter(text: str) -> Adapter:
    rank, _, alpha = text.partition("/")
    if not (rank.isdecimal() and alpha.isdecimal() and int(rank) and int(alpha)):
        raise UsageError(f'--adapters "{text}": expected rank and alpha as whole numbers from 1, such as 16/16,64/32')
    return Adapter(int(rank), int(alpha))


def _print(console: Console, found: AdapterTable) -> None:
    asked = found.question
    words = ", ".join([*(f"{key}={value}" for key, value in asked.settings.items()), *filter(None, [asked.strategies])])
    table = Table(title=Text(f"QLoRA (r/alpha) and full fine-tuning: {words}"))
    table.add_column("model")
    table.add_column("method")
    table.add_column("trained", justify="right")
    for name in asked.devices:
        table.add_column(Text(name), justify="right")
        table.add_column("step", justify="right")
    last = ""
    for (model, method), row in groupby(found.cells, key=lambda cell: (cell.model, cell.method)):
        cells = list(row)
        shown = [Text(word, "" if cell.fits else "red") for cell in cells for word in _words(cell)]
        table.add_row("" if model == last else model, method, f"{cells[0].trained / 1e6:,.1f} M", *shown)
        last = model
    print_table(console, table)
    console.print(
        Text("Memory: peak reserved and the CUDA context; ×: does not fit, with the memory it needs.", "dim"),
        Text("Predicted: nothing was computed. The time of a step is an estimate.", "dim"),
        *(Text(note, "dim") for note in found.notes),
        sep="\n",
    )


def _words(cell: AdapterCell) -> list[str]:
    needed = format_bytes(cell.needed_bytes)
    if not cell.fits:
        return [f"× {needed}", "–"]
    return [needed, "–" if cell.step_seconds is None else format_seconds(cell.step_seconds)]


def _next_words(found: AdapterTable) -> list[str]:
    """A profile of the case that fills a device most, or else of the smallest one."""
    cell = found.largest_that_fits or min(found.cells, key=lambda cell: cell.needed_bytes)
    asked = found.question
    words = ["memscope", "profile", *words_of(f"hf:{cell.model}", None, asked.settings), "--device", cell.device]
    plan = asked.plan(cell.adapter)
    return [*words, *(["-s", plan] if plan else [])]
