"""The frameworks, which are installed with an extra."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["needed"]


def needed(*modules: str, extra: str) -> Any:
    """Import the first of several modules that is installed.

    Raises:
        ModuleNotFoundError: none of them is; the message names the extra that installs it.
    """
    for module in modules:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (module, module.partition(".")[0]):
                raise
    package = modules[0].partition(".")[0]
    raise ModuleNotFoundError(
        f'memscope.integrations.{extra} needs {package}, which is not installed: pip install "torch-memscope[{extra}]"',
        name=package,
    )
