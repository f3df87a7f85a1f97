"""The largest size that fits: a search that simulates the sizes on both sides of the boundary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from memscope.advisor.fit.fitting import Evidence, Largest
from memscope.errors import MemscopeError, UsageError
from memscope.runs.worker import RunLost

__all__ = ["Boundary", "SizeAsker", "told"]

SizeAsker = Callable[[Sequence[int], bool], Mapping[int, Evidence | MemscopeError]]
"""`ask(values, whole)`: what simulations with these values of a size show; `whole`: with every micro-batch."""

_GUESSES = 4
"""Rounds after which the range is cut in three rather than interpolated."""
_MOST_GROWTH = 8
"""How much larger than the largest known value the next one may be."""
_APART = 1.25
"""Ratio of two values from which on a curve goes through both."""
_FULL = 0.97
"""Share of its memory that PyTorch's allocator can usually allocate; the rest is lost in fragments."""


@dataclass
class Boundary:
    """The search for the largest value of one size.

    Memory is taken to grow with the size. Each round simulates two values, which two processes do at once: first twice
    and four times the size that is known, then those at which a curve through the known points is near the limit, and
    at last thirds of the range. The search ends with two neighbours of which one fits and the other does not.
    """

    ask: SizeAsker
    allocatable_bytes: int
    """What the device can give to PyTorch's allocator."""
    unit: int
    most: int
    """The largest value to try, a multiple of the unit."""
    why_most: str
    """Why no larger value is tried."""
    known: dict[int, Evidence] = field(default_factory=dict)
    """What is known before, by value; any values."""
    refused: dict[int, MemscopeError] = field(default_factory=dict)
    """The values whose simulations have no result: the target refused them, or failed, or was lost."""

    def found(self) -> Largest:
        """Search, and simulate the largest value that fits with every micro-batch."""
        rounds = 0
        while True:
            low, high = self._range()
            if high - low > self.unit:
                self._look(self._proposed(low, high, rounds), whole=False)
                rounds += 1
            elif low and not self.known[low].is_whole:
                self._look([low], whole=True)
            else:
                return self._largest(low, high)

    def _range(self) -> tuple[int, int]:
        """The smallest value that does not fit, or is not to be tried, and the largest below it that fits."""
        out = [value for value, one in self.known.items() if not one.fits and value % self.unit == 0]
        high = min([*out, *self.refused, self.most + self.unit])
        fitting = [value for value, one in self.known.items() if one.fits and value % self.unit == 0]
        return max([value for value in fitting if value < high], default=0), high

    def _look(self, values: Sequence[int], *, whole: bool) -> None:
        for value, answer in self.ask(values, whole).items():
            if isinstance(answer, MemscopeError):
                self.refused[value] = answer
            else:
                self.known[value] = answer

    def _proposed(self, low: int, high: int, rounds: int) -> list[int]:
        """The next values to simulate: one or two multiples of the unit between `low` and `high`."""
        points = sorted((value, one.peak.allocated) for value, one in self.known.items())
        unit = self.unit
        if len(points) == 1:
            ((value, one),) = self.known.items()
            factors = (2, 4) if one.fits else (0.5, 0.25)
            wanted = [round(value * factor / unit) * unit for factor in factors]
        elif rounds < _GUESSES:
            end = min(high, _MOST_GROWTH * points[-1][0] // unit * unit + unit)
            wanted = [_crossing(points, share * self.allocatable_bytes, low, end, unit) for share in (_FULL, 1)]
            if wanted[0] == wanted[1]:
                wanted[1] += unit
        else:
            wanted = [low + (high - low) * third // 3 // unit * unit for third in (1, 2)]
        inside = [min(max(value, low + unit), high - unit) for value in wanted]
        return list(dict.fromkeys(inside))

    def _largest(self, low: int, high: int) -> Largest:
        if high in self.known:
            return Largest(low, self.unit, high)
        if high in self.refused:
            return Largest(low, self.unit, None, told(f"{high:,}", self.refused[high]))
        return Largest(low, self.unit, None, self.why_most)


def told(size: str, error: MemscopeError) -> str:
    """Why a size has no result, for the user."""
    if isinstance(error, UsageError):
        return f"the target refuses {size}: {error}"
    if isinstance(error, RunLost):
        return f"{size} has no result, so it may fit: {error}"
    return f"{size} cannot be simulated: {error}"


def _crossing(points: Sequence[tuple[int, int]], limit_bytes: float, low: int, high: int, unit: int) -> int:
    """The largest multiple of the unit in `[low, high)` at which the curve through up to three points is in the limit.

    The points are those nearest to the limit: memory is linear in the micro-batch, and at most quadratic in the length.
    """
    nearest: list[tuple[int, int]] = []
    for x, y in sorted(points, key=lambda point: abs(point[1] - limit_bytes)):
        # Points side by side would tell the slope of the blocks' rounding.
        if all(max(x, other) >= _APART * min(x, other) for other, _ in nearest):
            nearest.append((x, y))
    del nearest[3:]

    def expected(value: int) -> float:
        total = 0.0
        for x, y in nearest:
            factor = float(y)
            for other, _ in nearest:
                if other != x:
                    factor *= (value - other) / (x - other)
            total += factor
        return total

    first, last = low // unit, high // unit - 1
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if expected(middle * unit) <= limit_bytes else (first, middle - 1)
    return first * unit
