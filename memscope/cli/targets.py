"""`memscope targets`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from memscope.cli.next_command import FIRST_PROFILE, print_next
from memscope.command.options import debug_option
from memscope.workload.settings import format_value, help_of, non_defaults
from memscope.workload.target import settings_of_shipped, shipped_targets

__all__ = ["command"]


@click.command("targets")
@debug_option
def command() -> None:
    """List the targets that come with memscope, with presets (--preset) and settings (--set KEY=VALUE)."""
    console = Console(highlight=False)
    for name in shipped_targets():
        module = settings_of_shipped(name)
        console.print(Text(f"targets/{name}", style="bold"))
        for example, about in getattr(module, "EXAMPLES", {}).items():
            _print_row(console, f"{name}:{example}", about)
        if len(module.PRESETS) > 1:
            for preset, config in module.PRESETS.items():
                changed = ", ".join(f"{k}={v}" for k, v in non_defaults(config).items()) or "the defaults below"
                _print_row(console, f"--preset {preset}", changed)
        _print_settings(console, next(iter(module.PRESETS.values())))
    console.print()
    print_next(console, [*FIRST_PROFILE, "--strategies", "lora,amp"])


def _print_settings(console: Console, default: Any) -> None:
    texts = help_of(type(default))
    for field in dataclasses.fields(default):
        value = format_value(getattr(default, field.name))
        _print_row(console, f"--set {field.name}={value}", texts.get(field.name, ""))


def _print_row(console: Console, what: str, about: str) -> None:
    console.print(Padding(Text.assemble((what, "cyan"), " ", about), (0, 0, 0, 4)))
