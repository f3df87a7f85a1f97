"""`memscope study`: a group of commands, one module each."""

from __future__ import annotations

import importlib
from typing import Any

import click

from memscope.errors import UsageError, nearest

__all__ = ["command"]

_STUDIES = {
    "adapters": "Compare QLoRA of several ranks with full fine-tuning, over models and devices.",
    "budget": "Say what a budget of time buys on a device: iterations, tokens and MFU, against Chinchilla's optimum.",
}


class _Studies(click.Group):
    """A group that imports a study's module only when the study runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_STUDIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _STUDIES:
            return None
        command: click.Command = importlib.import_module(f"memscope.cli.study_{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Studies"):
            formatter.write_dl(list(_STUDIES.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in _STUDIES:
            raise UsageError(f'no study "{args[0]}": {nearest(args[0], _STUDIES)}')
        return super().resolve_command(ctx, args)


@click.group("study", cls=_Studies, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Answer one question over many simulations, as a table and JSON."""
