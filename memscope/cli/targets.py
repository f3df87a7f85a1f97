"""`memscope targets`."""

from __future__ import annotations

import dataclasses

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from memscope.cli.next_command import FIRST_PROFILE, print_next
from memscope.command.options import debug_option
from memscope.workload.settings import format_value, help_of, non_defaults
from memscope.workload.target import find_target, shipped_targets

__all__ = ["command"]

_INDENT = (0, 0, 0, 4)


@click.command("targets")
@debug_option
def command() -> None:
    """List the targets that come with memscope, with presets (--preset) and settings (--set KEY=VALUE)."""
    console = Console(highlight=False)
    for name in shipped_targets():
        target = find_target(name)
        console.print(Text(f"targets/{name}", style="bold"))
        default = next(iter(target.presets.values()))
        for preset, config in target.presets.items():
            changed = ", ".join(f"{k}={v}" for k, v in non_defaults(config).items()) or "the defaults below"
            console.print(Padding(Text.assemble((f"--preset {preset}", "cyan"), " ", changed), _INDENT))
        texts = help_of(type(default))
        for field in dataclasses.fields(default):
            default_value = format_value(getattr(default, field.name))
            setting = Text.assemble((f"--set {field.name}={default_value}", "cyan"), " ", texts.get(field.name, ""))
            console.print(Padding(setting, _INDENT))
    console.print()
    print_next(console, [*FIRST_PROFILE, "--strategies", "lora,amp"])
