"""The end of a program that has made enough steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Enough", "StepLimits", "Stop"]

Stop: TypeAlias = Callable[[], None]
"""Ends the program: writes the results, then raises `Enough`. In a fork it does nothing."""


@dataclass(frozen=True)
class StepLimits:
    """How far a program goes."""

    steps: int | None
    """Number of optimizer steps after which it has done enough; None: it runs to its end."""
    deadline: float | None = None
    """Time, as `time.monotonic` gives it, after which it ends once its step is complete; None: never."""


class Enough(SystemExit):
    """Unwinds a program that has made as many steps as were asked for; Python ends with exit code 0, silently."""

    def __init__(self) -> None:
        super().__init__(0)
