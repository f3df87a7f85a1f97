"""The command `memscope`: one module a command, loaded when it is used."""

from __future__ import annotations

import importlib
from keyword import iskeyword
from typing import Any

import click

from memscope import __version__
from memscope.command.options import debug_option
from memscope.command.run import run_command
from memscope.errors import UsageError, nearest

__all__ = ["cli", "main"]

_COMMANDS = {
    "profile": "Run a target with and without strategies; show where the memory goes and what each strategy changes.",
    "report": "Show traces as a page or as text: memory over time, allocations at the peak, ledger, allocator.",
    "diff": "Show what grew and shrank between two traces, and which settings differ.",
    "check": "Check a trace against limits: a budget, a size, or growth over a baseline. Exit code 3 if one fails.",
    "import": "Convert a PyTorch memory snapshot into a trace; nothing in the snapshot is executed.",
    "export": "Write a trace for PyTorch's memory viewer, Perfetto, Chrome, or as a table.",
    "fit": "Say whether a target fits a device, its largest micro-batch and context, and which devices hold it.",
    "advise": "Find the cheapest plan that fits a budget: strategies, and which layers to checkpoint.",
    "study": "Answer one question over many simulations: what a budget of time buys on a device.",
    "strategies": "List the strategies and their settings.",
    "targets": "List the targets that come with memscope, with their presets and settings.",
    "devices": "List the devices that can be simulated.",
}


class _LazyGroup(click.Group):
    """A group that imports a command's module only when the command runs, so that help does not import torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        command: click.Command = importlib.import_module(f"memscope.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in _COMMANDS:
            raise UsageError(f'no command "{args[0]}": {nearest(args[0], _COMMANDS)}')
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memscope")
@debug_option
def cli() -> None:
    """Show where the memory of a PyTorch training step goes, what a technique would change, and whether it fits.

    Results go to stdout, progress and errors to stderr.

    Exit codes: 0 ok; 1 error; 2 usage, including a file that is missing, of the wrong kind or not writable; 3 a check
    failed or nothing fits; 4 the target ran out of device memory; 130 stopped with Ctrl-C.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `memscope`."""
    run_command(cli, "memscope", arguments)
