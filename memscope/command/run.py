"""Run a command: each error becomes one message on stderr and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

import click

from memscope.errors import MemscopeError

__all__ = ["INTERRUPTED", "run_command"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it: 128 + SIGINT."""


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code.

    Args:
        command: the command; the number it returns is the exit code.
        name: the name of the command in its help.
        arguments: the words after the name; by default those of the process.
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
        sys.exit(INTERRUPTED)
    except MemscopeError as error:
        if "--debug" in words:
            traceback.print_exc()
        else:
            click.echo(f"memscope: error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        _report_bug(error, debug="--debug" in words)
        sys.exit(MemscopeError.exit_code)


def _report_bug(error: Exception, *, debug: bool) -> None:
    """Show an error that memscope has no message for."""
    if debug:
        traceback.print_exc()
        return
    text = " ".join(str(error).split())
    click.echo(f"memscope: error: {type(error).__name__}: {text}", err=True)
    click.echo("This is a bug in memscope. Please report it, with the traceback that --debug shows.", err=True)
