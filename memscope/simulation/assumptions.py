"""What a simulation takes for values that nobody can know before a run, and the list of what it took.

An assumption is listed when something depends on it: a number that the target's code reads, or the shape of a result.
Values that follow from assumed ones carry the assumptions they rest on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal, NamedTuple, get_args

from memscope.errors import UsageError, nearest, place

__all__ = ["Assume", "Assumptions", "Origin"]

Experts = Literal["balanced", "worst"]


@dataclass(frozen=True)
class Assume:
    """What a simulation may assume.

    Attributes:
        refuse: whether an unknown value ends the simulation instead.
        experts: what a router does: `balanced` sends every expert an equal share of the tokens, `worst` sends all
            tokens to the same experts.
    """

    refuse: bool = False
    experts: Experts = "balanced"

    @classmethod
    def parse(cls, text: str) -> Assume:
        """Read `refuse`, `experts=balanced` or `experts=worst`; an empty text stands for the defaults.

        Raises:
            UsageError: the text is none of these.
        """
        key, is_setting, value = text.partition("=")
        if not text:
            return cls()
        if text == "refuse":
            return cls(refuse=True)
        if key == "experts" and is_setting:
            if value in get_args(Experts):
                return cls(experts=value)  # type: ignore[arg-type]
            raise UsageError(f'"{value}" is not a way to spread tokens: {nearest(value, get_args(Experts))}')
        valid = ("refuse", *(f"experts={one}" for one in get_args(Experts)))
        raise UsageError(f'"{text}" is not something to assume: {nearest(text, valid)}')


class Origin(NamedTuple):
    """Where a value was assumed; the stack is that of the operator, the innermost frame first."""

    what: str
    value: str
    stack: tuple[tuple[str, int, str], ...]

    @classmethod
    def here(cls, what: str, value: str) -> Origin:
        """An assumption made by the operator that is running."""
        frames: list[tuple[str, int, str]] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return cls(what, value, tuple(frames))


@dataclass
class Assumptions:
    """The assumptions of one simulation.

    Attributes:
        policy: what may be assumed.
    """

    policy: Assume
    _places: dict[tuple[tuple[str, int, str], ...], str] = field(default_factory=dict)
    _found: dict[tuple[str, str, str], None] = field(default_factory=dict)

    def rest_on(self, origins: Iterable[Origin]) -> None:
        """Note that the simulation depends on values with these origins."""
        for origin in origins:
            where = self._places.get(origin.stack)
            if where is None:
                where = self._places[origin.stack] = place(origin.stack).removeprefix(" (at ").removesuffix(")")
            self._found.setdefault((origin.what, origin.value, where))

    def rows(self) -> list[dict[str, str]]:
        """Every assumption once: `what`, the `value` taken, and `where`, the user's line or an empty text."""
        return [dict(zip(("what", "value", "where"), found, strict=True)) for found in self._found]
