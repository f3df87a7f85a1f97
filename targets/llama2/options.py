"""The options that fine-tuning and generating share: one for each setting of a dataclass, and any other setting."""

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
    """An option for each of these settings, for all of them if none is named; as text, None where it is not given.

    Args:
        config: a dataclass whose fields all have defaults.
        names: which of its fields.
        metavars: what stands for the value in the help, where it is not VALUE.
        defaults: what the help says of a default, where it is not that of the field.
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
    """`changed` and `settings`: words KEY=VALUE for what has no option of its own."""
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
    "--device", metavar="cpu|cuda", help="Where to compute. Default: cuda where PyTorch has a GPU."
)
