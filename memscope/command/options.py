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

__all__ = [
    "ALLOCATOR", "ASSUME", "CHANGED", "DEVICE_FILE", "FILE", "PRESET", "TIMEOUT", "TRUST_REMOTE_CODE", "argument",
    "debug_option", "option", "with_options",
]  # fmt: skip

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

PRESET = option(
    "--preset",
    metavar="NAME|PATH",
    help="Preset of the target, or a file or folder with one. Default: the first. See: memscope targets.",
)
"""`--preset`, which `Target.configure` reads."""

CHANGED = option(
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the target; more may follow as KEY=VALUE.",
)
"""`--set`, which `memscope.command.target_words.settings_of` reads."""

TRUST_REMOTE_CODE = option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that comes with a model of hf:WHAT; short for --set trust_remote_code=true.",
)
"""`--trust-remote-code`."""

DEVICE_FILE = option("--device-file", type=FILE, metavar="FILE", help="TOML file with devices of your own.")
"""`--device-file`, which `load_devices` reads."""

ALLOCATOR = option(
    "--allocator",
    metavar="CONF",
    help="Settings of PyTorch's allocator, as in PYTORCH_CUDA_ALLOC_CONF, which is the default; version:2.4 simulates "
    "the allocator of another PyTorch.",
)
"""`--allocator`, which `AllocatorSettings.parse` reads."""

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
