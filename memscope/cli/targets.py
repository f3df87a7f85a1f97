"""`memscope targets`."""

from __future__ import annotations

import dataclasses

import click
from rich.console import Console
from rich.text import Text

from memscope.cli.next_command import FIRST_PROFILE, print_next
from memscope.command.options import debug_option
from memscope.settings import format_value, help_of, non_defaults
from memscope.target import find_target, shipped_targets

__all__ = ["command"]


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
            console.print(Text(f"    --preset {preset}", style="cyan"), Text(changed))
        texts = help_of(type(default))
        for field in dataclasses.fields(default):
            console.print(
                Text(f"    --set {field.name}={format_value(getattr(default, field.name))}", style="cyan"),
                Text(texts.get(field.name, "")),
            )
    console.print()
    print_next(console, [*FIRST_PROFILE, "--strategies", "lora,amp"])
