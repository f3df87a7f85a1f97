"""The command `memscope`: one module a command, loaded when it is used."""

from __future__ import annotations

import importlib
import sys
import traceback
from keyword import iskeyword
from typing import Any, NoReturn

import click

from memscope import __version__
from memscope.errors import MemscopeError

__all__ = ["cli", "main", "run_command"]

_COMMANDS = {
    "profile": "Run a target plain and with strategies; show where the memory goes and what each strategy changes.",
    "report": "Show traces: memory over time, what is alive at any moment, ledger, allocator; as a page or as text.",
    "diff": "What grew and what shrank from one trace to another, and which setting differs.",
    "check": "Hold a trace to limits: a budget, a size, or a growth over a baseline. Exit code 3 when one is passed.",
    "import": "Turn a memory snapshot of PyTorch into a trace; nothing in it is executed.",
    "export": "Write a trace for PyTorch's memory viewer, Perfetto, Chrome, or as a table.",
    "advise": "Find the cheapest plan that fits a budget: strategies, and which layers to checkpoint.",
    "strategies": "List the strategies and their settings.",
    "targets": "List the targets that come with memscope, their presets and settings.",
    "devices": "List the devices that can be simulated.",
}


class _LazyGroup(click.Group):
    """Commands whose module is imported only when they are used, so that help needs no torch."""

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
            from memscope.errors import UsageError, nearest

            raise UsageError(f'no command "{args[0]}": {nearest(args[0], _COMMANDS)}')
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memscope")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Where the memory of a PyTorch training step goes, what a technique would change, and whether it fits.

    Results go to stdout, progress and errors to stderr. Exit codes: 0 ok, 1 error, 2 usage, 3 gate failed or nothing
    fits, 4 the target ran out of device memory.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `memscope`."""
    run_command(cli, "memscope", arguments)


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a command and end the process; every error memscope knows becomes one message and its exit code.

    Args:
        command: what to run; the number it returns is the exit code.
        name: how it is called, for its help.
        arguments: the words after the name; those of the process if not given.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = command.main(words, prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except MemscopeError as error:
        if "--debug" in words:
            traceback.print_exc()
        else:
            click.echo(f"memscope: error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        _tell_fault(error, debug="--debug" in words)
        sys.exit(MemscopeError.exit_code)


def _tell_fault(error: Exception, *, debug: bool) -> None:
    """An error that nobody has foreseen."""
    if debug:
        traceback.print_exc()
        return
    text = " ".join(str(error).split())
    click.echo(f"memscope: error: {type(error).__name__}: {text}", err=True)
    click.echo("memscope did not foresee this: please report it, with what --debug shows", err=True)
