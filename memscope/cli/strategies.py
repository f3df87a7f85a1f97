"""`memscope strategies`."""

from __future__ import annotations

import dataclasses
import inspect

import click
from rich.console import Console
from rich.text import Text

from memscope.strategies import available
from memscope.workload.settings import format_value, help_of, setting_name

__all__ = ["command"]


@click.command("strategies")
def command() -> None:
    """List the strategies and their settings, with defaults, as a plan takes them: NAME:KEY=VALUE,KEY=VALUE.

    A setting that is true or false is switched on by its name alone, straight after the colon: adamw:fused.
    """
    console = Console(highlight=False)
    for name, strategy in sorted(available().items()):
        console.print(Text(name, style="bold"), Text(" ".join((inspect.getdoc(strategy) or "").split())))
        effect = "losses and gradients stay, up to rounding" if strategy.exact else f"changes {strategy.changes}"
        console.print(Text(f"    {effect}", style="dim"))
        texts = help_of(strategy.Config)
        for field in dataclasses.fields(strategy.Config):
            default = format_value(getattr(strategy.Config(), field.name))
            console.print(Text(f"    {setting_name(field)}={default}", style="cyan"), Text(texts.get(field.name, "")))
    console.print("\nNext: memscope profile targets/llama2 --strategies lora,amp")
