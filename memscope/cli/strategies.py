"""`memscope strategies`."""

from __future__ import annotations

import dataclasses
import inspect

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from memscope.cli.next_command import FIRST_PROFILE, print_next
from memscope.command.options import debug_option
from memscope.strategies import available
from memscope.workload.settings import bare_words, format_value, help_of, is_choice, is_switch, setting_name

__all__ = ["command"]

_INDENT = (0, 0, 0, 4)


@click.command("strategies")
@debug_option
def command() -> None:
    """List the strategies and their settings, with defaults, as a plan names them: NAME:KEY=VALUE,KEY=VALUE.

    The name of a true-or-false setting alone switches it on, and the name of an optimizer alone chooses it:
    optim:adamw,fused.
    """
    console = Console(highlight=False)
    for name, strategy in sorted(available().items()):
        console.print(Text(name, style="bold"), Text(" ".join((inspect.getdoc(strategy) or "").split())))
        kept = "keeps losses and gradients, up to rounding" if strategy.exact else ""
        changed = (
            f"{'in some models or settings ' if kept else ''}changes {strategy.changes}" if strategy.changes else ""
        )
        effect = "; ".join(filter(None, (kept, changed)))
        console.print(Padding(Text(effect, style="dim"), _INDENT))
        texts = help_of(strategy.Config)
        for field in dataclasses.fields(strategy.Config):
            default = format_value(getattr(strategy.Config(), field.name))
            named = _choices(strategy.Config) if is_choice(field) else f"{setting_name(field)}={default}"
            setting = Text.assemble((named, "cyan"), " ", texts.get(field.name, ""))
            console.print(Padding(setting, _INDENT))
    console.print()
    print_next(console, [*FIRST_PROFILE, "--strategies", "lora,amp"])


def _choices(config: type) -> str:
    """The values that stand alone, as in `a | b | c`."""
    return " | ".join(word for word in bare_words(config) if not is_switch(config, word))
