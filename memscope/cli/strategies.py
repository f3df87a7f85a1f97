"""`memscope strategies`."""

from __future__ import annotations

import dataclasses
import inspect

import click
from rich.console import Console
from rich.text import Text

from memscope.cli.next_command import FIRST_PROFILE, print_next
from memscope.command.options import debug_option
from memscope.settings import format_value, help_of
from memscope.strategies import available

__all__ = ["command"]


@click.command("strategies")
@debug_option
def command() -> None:
    """List the strategies and their settings, with defaults, as a plan names them: NAME:KEY=VALUE,KEY=VALUE.

    The name of a true-or-false setting alone, directly after the colon, switches it on: adamw:fused.
    """
    console = Console(highlight=False)
    for name, strategy in sorted(available().items()):
        console.print(Text(name, style="bold"), Text(" ".join((inspect.getdoc(strategy) or "").split())))
        effect = "keeps losses and gradients, up to rounding" if strategy.exact else f"changes {strategy.changes}"
        console.print(Text(f"    {effect}", style="dim"))
        texts = help_of(strategy.Config)
        for field in dataclasses.fields(strategy.Config):
            default = format_value(getattr(strategy.Config(), field.name))
            console.print(Text(f"    {field.name}={default}", style="cyan"), Text(texts.get(field.name, "")))
    console.print()
    print_next(console, [*FIRST_PROFILE, "--strategies", "lora,amp"])
