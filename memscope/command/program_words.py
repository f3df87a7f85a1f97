"""The command line of a program, which follows `--` in a command of memscope."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

__all__ = ["TakesProgram", "given_program", "split_program"]

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
