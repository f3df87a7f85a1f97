"""The command line of a program, which follows `--` in a command of memscope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from memscope.errors import UsageError

__all__ = ["TakesProgram", "given_program", "refuse_target", "split_program"]

_KEY = "memscope.program"


def split_program(words: Sequence[str]) -> tuple[list[str], tuple[str, ...] | None]:
    """Split a command line at the first `--`: memscope's own words, and those of a program (None without `--`)."""
    own = list(words)
    if "--" not in own:
        return own, None
    place = own.index("--")
    return own[:place], tuple(own[place + 1 :])


class TakesProgram(click.Command):
    """A command that takes a target, or a program's command line after `--`; see `given_program`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words before `--`; those after it are kept as they are."""
        own, program = split_program(args)
        ctx.meta[_KEY] = program
        return super().parse_args(ctx, own)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What the first line of the help shows."""
        return ["[OPTIONS]", "TARGET [KEY=VALUE]... | -- COMMAND..."]


def given_program() -> tuple[str, ...] | None:
    """The program's command line of the command that is running; None: it was given none."""
    found: Any = click.get_current_context().meta.get(_KEY)
    return None if found is None else tuple(found)


def refuse_target(command: str, options: Any, of_targets: Mapping[str, str]) -> None:
    """Check that a command that is given a program is given no target as well, nor an option of one.

    Args:
        command: the command's name.
        options: its options, with a field `target`.
        of_targets: options that a program cannot have, as they are written, by their fields.

    Raises:
        UsageError: it is.
    """
    if options.target:
        raise UsageError(
            f'"{options.target}" stands before --: {command} takes a target or a program, not both. Options of '
            "memscope go before --, those of the program after it"
        )
    for name, flag in of_targets.items():
        if getattr(options, name):
            raise UsageError(f"{flag} is for targets: leave it out where a program follows --")
