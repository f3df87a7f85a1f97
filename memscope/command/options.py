"""The options of a command as one frozen dataclass, each declared where it is typed.

```
@dataclass(frozen=True)
class CheckOptions:
    file: Annotated[Path, argument(type=FILE)]
    budget: Annotated[str | None, option("--budget", metavar="SIZE", help="Memory of the device, such as 40GB.")]

@click.command("check")
@with_options(CheckOptions)
def command(options: CheckOptions) -> int: ...
```
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import click

__all__ = ["ASSUME", "FILE", "TIMEOUT", "argument", "debug_option", "option", "with_options"]

_Command: TypeAlias = Callable[..., Any]
_Declaration: TypeAlias = Callable[[str], Callable[[_Command], _Command]]
"""Takes the name of the field; returns click's decorator."""

FILE = click.Path(path_type=Path)
"""The type of an option that is a path; the command itself reports what is wrong with the file."""

debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
"""`--debug`, which `run_command` reads."""


def option(*flags: str, **settings: Any) -> _Declaration:
    """A field that is an option; `settings` are those of `click.option`."""
    return lambda name: click.option(*flags, name, **settings)


TIMEOUT = option(
    "--timeout",
    metavar="TIME",
    help="Longest time of a single run, such as 90s or 10min; a run that takes longer is ended with an error. "
    "Default: no limit.",
)
"""`--timeout`, which `memscope.units.parse_seconds` reads."""


ASSUME = option(
    "--assume",
    default="",
    metavar="WHAT",
    help="What a simulation takes for values that it cannot know: refuse (nothing: the run fails), experts=balanced (a "
    "router sends every expert an equal share) or experts=worst (all tokens to the same experts). "
    "Default: experts=balanced.",
)
"""`--assume`, which `memscope.simulation.assumptions.Assume` reads."""


def argument(**settings: Any) -> _Declaration:
    """A field that is an argument; `settings` are those of `click.argument`."""
    return lambda name: click.argument(name, **settings)


def with_options(kind: type) -> Callable[[_Command], _Command]:
    """Give a command the options of a dataclass, in the order of its fields, and `--debug`.

    The command is called with an instance of `kind`; options that other decorators add follow as keywords.
    """
    fields = {name: hint.__metadata__[0] for name, hint in typing.get_type_hints(kind, include_extras=True).items()}

    def decorated(function: _Command) -> _Command:
        @functools.wraps(function)
        def command(**values: Any) -> Any:
            own = {name: values.pop(name) for name in fields}
            return function(kind(**own), **values)

        declared: _Command = debug_option(command)
        for name, declaration in reversed(fields.items()):
            declared = declaration(name)(declared)
        return declared

    return decorated
