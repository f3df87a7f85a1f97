"""The end of a program that has made enough steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Enough", "Stop"]

Stop: TypeAlias = Callable[[], None]
"""Ends the program: writes the results, then raises `Enough`. In a fork it does nothing."""


class Enough(SystemExit):
    """Unwinds a program that has made as many steps as were asked for; Python ends with exit code 0, silently."""

    def __init__(self) -> None:
        super().__init__(0)
