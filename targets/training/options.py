"""Options that fine-tuning and generation share: one per field of a dataclass, and KEY=VALUE for other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import click

from memscope.workload.settings import format_value, help_of

__all__ = ["device_option", "other_settings", "setting_options"]

_Function = Callable[..., Any]
_Decorator = Callable[[_Function], _Function]


def setting_options(
    config: type,
    *names: str,
    metavars: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> _Decorator:
    """Add an option for each of these settings. Its value is text, or None if the option is not given.

    Args:
        config: a dataclass whose fields all have defaults.
        names: the fields to add; all if empty.
        metavars: placeholders for values in the help, if not VALUE.
        defaults: descriptions of defaults in the help, if not the default of the field.
    """
    default, helps = config(), help_of(config)

    def decorated(function: _Function) -> _Function:
        for name in reversed(names or [field.name for field in dataclasses.fields(config)]):
            without = (defaults or {}).get(name) or format_value(getattr(default, name))
            function = click.option(
                f"--{name.replace('_', '-')}",
                name,
                metavar=(metavars or {}).get(name, "VALUE"),
                help=f"{helps[name]}  [default: {without}]",
            )(function)
        return function

    return decorated


def other_settings(function: _Function) -> _Function:
    """Add `changed` and `settings`: KEY=VALUE words for settings without an option of their own."""
    function = click.option(
        "--set",
        "changed",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a setting of the target, such as dtype=bf16 or attention=sdpa (see: memscope targets); "
        "more may follow as KEY=VALUE.",
    )(function)
    return click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")(function)


device_option: _Decorator = click.option(
    "--device", metavar="cpu|cuda", help="Device to compute on. Default: cuda if PyTorch finds a GPU, else cpu."
)
