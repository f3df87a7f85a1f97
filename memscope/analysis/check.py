"""Limits that a trace must keep: a budget, an absolute size, or a growth over a baseline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from memscope.analysis.cost import step_seconds
from memscope.analysis.ledger import ledger
from memscope.errors import UsageError, nearest
from memscope.trace import CATEGORIES, Trace
from memscope.units import format_bytes, format_given, format_seconds, parse_bytes

__all__ = ["KEYS", "Limit", "Verdict", "budget_verdict", "check", "format_value"]

KEYS: tuple[str, ...] = ("peak", "reserved", "device", *CATEGORIES, "step_time")
"""What can be limited. `peak`: most allocated. `reserved`: most that the allocator held. `device`: what the driver
counts of the process. A category: its largest size. `step_time`: seconds of the last step."""
_SECONDS = {"ms": Fraction(1, 1000), "s": Fraction(1)}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(ms|s)\s*")
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*")


@dataclass(frozen=True)
class Limit:
    """`peak:40GB`, `peak:+5%` or `peak:+500MiB`; those with a plus are over a baseline."""

    key: str
    text: str
    """As it was given, without the key."""
    added: Fraction = Fraction(0)
    """Bytes (of step_time: seconds): all that is allowed, or, where `relative`, what is on top of the baseline."""
    share: Fraction = Fraction(0)
    """Of the baseline, on top of it."""
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read `KEY:LIMIT`.

        Raises:
            UsageError: for an unknown key, or a limit that is no size, duration or growth.
        """
        key, colon, limit = (part.strip() for part in text.partition(":"))
        if not colon or not limit:
            raise UsageError(
                f'"{text}" is no limit: expected KEY:LIMIT, for example peak:40GB, peak:+5% or peak:+500MiB'
            )
        name = key.replace(" ", "_").replace("-", "_")
        if name not in KEYS:
            raise UsageError(f'cannot limit "{key}": {nearest(name, KEYS)}')
        relative, amount = limit.startswith("+"), limit.removeprefix("+")
        percent = _PERCENT.fullmatch(amount)
        if percent and relative:
            return cls(name, limit, share=Fraction(percent[1]) / 100, relative=True)
        if percent:
            raise UsageError(f'limit "{text}": a share is a growth over a baseline: write {key}:+{amount}')
        return cls(name, limit, added=_amount(name, amount, text), relative=relative)

    def allowed(self, baseline: Fraction | None) -> Fraction:
        """The most that is allowed, in bytes or seconds."""
        if not self.relative:
            return self.added
        assert baseline is not None, "a relative limit is over a baseline"
        return baseline * (1 + self.share) + self.added


def _amount(key: str, amount: str, text: str) -> Fraction:
    if key == "step_time":
        duration = _DURATION.fullmatch(amount)
        if duration is None:
            raise UsageError(f'limit "{text}": expected seconds, for example {key}:2.5s, {key}:800ms or {key}:+5%')
        return Fraction(duration[1]) * _SECONDS[duration[2]]
    if amount.strip().replace(".", "").isdigit():
        raise UsageError(f'limit "{text}" has no unit: write {key}:{amount}GB, or B, MiB, GiB; or a growth, {key}:+5%')
    try:
        return Fraction(parse_bytes(amount))
    except UsageError as error:
        raise UsageError(f'limit "{text}": {error}; or a growth such as {key}:+5%') from None


@dataclass(frozen=True)
class Verdict:
    """A limit, and what it was held against: bytes, of step_time seconds."""

    key: str
    limit: str
    value: Fraction
    allowed: Fraction
    baseline: Fraction | None = None
    estimate: bool = False
    """The value, or the baseline's, is an estimate."""

    @property
    def holds(self) -> bool:
        """Whether the value is not over what is allowed."""
        return self.value <= self.allowed


def check(trace: Trace, limits: Sequence[Limit], baseline: Trace | None = None) -> tuple[Verdict, ...]:
    """Hold a trace against each limit.

    Raises:
        UsageError: when a trace does not have what is limited, or a limit needs a baseline and there is none.
    """
    return tuple(_verdict(trace, limit, baseline) for limit in limits)


def _verdict(trace: Trace, limit: Limit, baseline: Trace | None) -> Verdict:
    value, estimate = _value(trace, limit.key, "the trace")
    if not limit.relative:
        return Verdict(limit.key, limit.text, value, limit.allowed(None), None, estimate)
    if baseline is None:
        raise UsageError(
            f"{limit.key}:{limit.text} is a growth over a baseline, and there is none: name it, --baseline base.npz"
        )
    before, also = _value(baseline, limit.key, "the baseline")
    return Verdict(limit.key, limit.text, value, limit.allowed(before), before, estimate or also)


def budget_verdict(trace: Trace, budget_bytes: int) -> Verdict:
    """Whether a run fits a budget: by what the driver counts, or the nearest to that which the trace knows."""
    found = ledger(trace)
    known = [key for key in ("device", "reserved") if found and found.total(key) is not None]
    key = known[0] if known else "peak"
    value, estimate = _value(trace, key, "the trace")
    return Verdict(key, f"budget {format_given(budget_bytes)}", value, Fraction(budget_bytes), None, estimate)


def _value(trace: Trace, key: str, whose: str) -> tuple[Fraction, bool]:
    """What is limited, in bytes or seconds, and whether it is an estimate."""
    if key == "peak":
        return Fraction(trace.peak.allocated_bytes), False
    if key == "step_time":
        return _step_seconds(trace, whose)
    if key in CATEGORIES:
        return Fraction(trace.max_by_category()[key]), False
    found = ledger(trace)
    total = found.total(key) if found else None
    if found is None or total is None:
        why = found.note if found else "it was recorded where no allocator holds memory"
        raise UsageError(f"{whose} does not know {key} memory ({why}): limit peak instead")
    return Fraction(total), found[key].estimate


def _step_seconds(trace: Trace, whose: str) -> tuple[Fraction, bool]:
    measured = trace.meta.get("seconds")
    if measured:
        return Fraction(measured[-1]), False
    phases = step_seconds(trace, trace.steps[-1]) if trace.steps else None
    if phases is None:
        raise UsageError(
            f"{whose} does not know step_time: it was not measured, and there is no estimate for its device"
        )
    return Fraction(sum(phases.values())), True


def format_value(key: str, value: Fraction) -> str:
    """A value of a key as text: seconds for step_time, else bytes."""
    return format_seconds(float(value)) if key == "step_time" else format_bytes(int(value))
