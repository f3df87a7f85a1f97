"""Run a command: each error becomes one message on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import NoReturn

import click

from memscope.command.output import keep_stdout_for_results
from memscope.errors import MemscopeError, TraceFileError
from memscope.interrupts import INTERRUPTED, end_on_interrupt

__all__ = ["run_command"]

_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EPERM", "EROFS")
    if hasattr(errno, name)
}
"""Numbers of the system errors that no program can prevent: a full disk, a right that is missing."""


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code.

    Args:
        command: the command; the number it returns is the exit code.
        name: the name of the command in its help.
        arguments: the words after the name. None: those of the process, which is the command's own from here on. Ctrl-C
            ends it, and stdout is kept for the command's results.
    """
    words = sys.argv[1:] if arguments is None else arguments
    told = words[: words.index("--")] if "--" in words else words  # what follows belongs to a program
    if arguments is None:
        end_on_interrupt()
        keep_stdout_for_results()
    try:
        code = command.main(words, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("stopped", err=True)
        sys.exit(INTERRUPTED)
    except MemscopeError as error:
        _tell(error, str(error), told)
        sys.exit(error.exit_code)
    except MemoryError as error:
        _tell(error, "the host ran out of memory: close other programs, or choose smaller settings", told)
        sys.exit(MemscopeError.exit_code)
    except BrokenPipeError:  # the reader of stdout, such as `head`, has seen enough
        _drop_stdout()
        sys.exit(MemscopeError.exit_code)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            _report_bug(error, told)
            sys.exit(MemscopeError.exit_code)
        _drop_stdout()
        _tell(error, f"{error.filename or 'the output'}: {error.strerror}", told)
        sys.exit(TraceFileError.exit_code)
    except Exception as error:
        _report_bug(error, told)
        sys.exit(MemscopeError.exit_code)


def _tell(error: Exception, message: str, words: list[str]) -> None:
    if "--debug" in words:
        traceback.print_exception(error)
    else:
        click.echo(f"memscope: error: {message}", err=True)


def _drop_stdout() -> None:
    """Drop what is still buffered for stdout: Python would complain at its exit that it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def _report_bug(error: Exception, words: list[str]) -> None:
    """Show an error that memscope has no message for."""
    _tell(error, f"{type(error).__name__}: {' '.join(str(error).split())}", words)
    if "--debug" not in words:
        click.echo("This is a bug in memscope. Please report it, with the traceback that --debug shows.", err=True)
