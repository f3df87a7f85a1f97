"""Check a trace against limits: a budget, an absolute limit, or a growth over a baseline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from memscope.analysis.cost import last_step_seconds
from memscope.analysis.fit import Fit, fit_of
from memscope.analysis.ledger import ledger
from memscope.errors import UsageError, excerpt, nearest
from memscope.trace import CATEGORIES, Trace
from memscope.units import format_bytes, format_given, format_seconds, parse_bytes

__all__ = ["KEYS", "TraceLimit", "Verdict", "budget_verdict", "check", "format_value"]

KEYS: tuple[str, ...] = ("peak", "reserved", "device", "host", *CATEGORIES, "step_time")
"""Quantities that can be limited. `peak`: peak allocated bytes. `reserved`: peak reserved bytes. `device`: memory as
counted by the driver. `host`: bytes that the step takes on the host. A category: its peak bytes. `step_time`: seconds
of the last step."""
_SECONDS = {"ms": Fraction(1, 1000), "s": Fraction(1)}
_NUMBER = r"\s*(\d{1,12}(?:\.\d{1,12})?|\.\d{1,12})\s*"
_DURATION = re.compile(rf"{_NUMBER}(ms|s)\s*")
_PERCENT = re.compile(rf"{_NUMBER}%\s*")


@dataclass(frozen=True)
class TraceLimit:
    """A limit such as `peak:40GB`, `peak:+5%` or `peak:+500MiB`; a plus means relative to a baseline."""

    key: str
    text: str
    """The limit as given, without the key."""
    added: Fraction = Fraction(0)
    """The limit in bytes (step_time: seconds); if `relative`, the amount allowed on top of the baseline."""
    share: Fraction = Fraction(0)
    """Fraction of the baseline that is allowed on top of it."""
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> TraceLimit:
        """Parse `KEY:LIMIT`.

        Raises:
            UsageError: the key is unknown, or the limit is not a size, duration or growth.
        """
        key, colon, limit = (part.strip() for part in text.partition(":"))
        if not colon or not limit:
            raise UsageError(
                f'"{excerpt(text)}" is not a limit: expected KEY:LIMIT, for example peak:40GB, peak:+5% or peak:+500MiB'
            )
        name = key.replace(" ", "_").replace("-", "_")
        if name not in KEYS:
            raise UsageError(f'cannot limit "{excerpt(key)}": {nearest(name, KEYS)}')
        relative, amount = limit.startswith("+"), limit.removeprefix("+")
        percent = _PERCENT.fullmatch(amount)
        if percent and relative:
            return cls(name, limit, share=Fraction(percent[1]) / 100, relative=True)
        if percent:
            raise UsageError(f'limit "{text}": a percentage must be a growth over a baseline: write {key}:+{amount}')
        return cls(name, limit, added=_amount(name, amount, text), relative=relative)

    def allowed(self, baseline: Fraction | None) -> Fraction:
        """The limit in bytes or seconds, given the baseline's value."""
        if not self.relative:
            return self.added
        assert baseline is not None, "a relative limit needs a baseline"
        return baseline * (1 + self.share) + self.added


def _amount(key: str, amount: str, text: str) -> Fraction:
    whole, amount = excerpt(text), amount.strip()
    if key == "step_time":
        duration = _DURATION.fullmatch(amount)
        if duration is None:
            raise UsageError(f'limit "{whole}": expected seconds, for example {key}:2.5s, {key}:800ms or {key}:+5%')
        return Fraction(duration[1]) * _SECONDS[duration[2]]
    try:
        size_bytes = parse_bytes(amount)
    except UsageError as error:
        raise UsageError(f'limit "{whole}": {error}; or a growth such as {key}:+5%') from None
    if amount.replace(".", "").isdigit():
        raise UsageError(
            f'limit "{whole}" has no unit: write {key}:{amount}GB (or B, MiB, GiB), or a growth, {key}:+5%'
        )
    return Fraction(size_bytes)


@dataclass(frozen=True)
class Verdict:
    """A checked limit: the value and the limit in bytes (step_time: seconds)."""

    key: str
    limit: str
    value: Fraction
    allowed: Fraction
    baseline: Fraction | None = None
    estimate: bool = False
    """Whether the value or the baseline's value is an estimate."""
    fit: Fit | None = None
    """For the budget of a simulated run: how safely it fits."""

    @property
    def holds(self) -> bool:
        """Whether the value does not exceed the limit."""
        return self.value <= self.allowed


def check(trace: Trace, limits: Sequence[TraceLimit], baseline: Trace | None = None) -> tuple[Verdict, ...]:
    """Check a trace against each limit.

    Raises:
        UsageError: a trace has no value for a limited quantity, or a limit needs a baseline and none is given.
    """
    return tuple(_verdict(trace, limit, baseline) for limit in limits)


def _verdict(trace: Trace, limit: TraceLimit, baseline: Trace | None) -> Verdict:
    value, estimate = _value(trace, limit.key, "the trace")
    if not limit.relative:
        return Verdict(limit.key, limit.text, value, limit.allowed(None), None, estimate)
    if baseline is None:
        raise UsageError(
            f"{limit.key}:{limit.text} is a growth over a baseline, but no baseline is given: add --baseline base.npz"
        )
    before, also = _value(baseline, limit.key, "the baseline")
    return Verdict(limit.key, limit.text, value, limit.allowed(before), before, estimate or also)


def budget_verdict(trace: Trace, budget_bytes: int) -> Verdict:
    """Check whether a run fits a budget, by the driver's count or, if unknown, by reserved or else allocated memory."""
    found = ledger(trace)
    known = [key for key in ("device", "reserved") if found and found.total(key) is not None]
    key = known[0] if known else "peak"
    value, estimate = _value(trace, key, "the trace")
    fit = fit_of(trace, budget_bytes)
    return Verdict(key, f"budget {format_given(budget_bytes)}", value, Fraction(budget_bytes), None, estimate, fit)


def _value(trace: Trace, key: str, whose: str) -> tuple[Fraction, bool]:
    """The value of a limited quantity, in bytes or seconds, and whether it is an estimate."""
    if key == "peak":
        return Fraction(trace.peak.allocated_bytes), False
    if key == "step_time":
        return _step_seconds(trace, whose)
    if key == "host":
        if trace.host is None:
            raise UsageError(f"{whose} has no value for host memory: simulations of a GPU follow it, recordings do not")
        return Fraction(int(trace.host.reserved.max(initial=0))), False
    if key in CATEGORIES:
        return Fraction(trace.max_by_category()[key]), False
    found = ledger(trace)
    total = found.total(key) if found else None
    if found is None or total is None:
        why = found.note if found else "it was recorded on a device without a caching allocator"
        raise UsageError(f"{whose} has no value for {key} memory ({why}): limit peak instead")
    return Fraction(total), found[key].estimate


def _step_seconds(trace: Trace, whose: str) -> tuple[Fraction, bool]:
    measured = trace.meta.get("seconds")
    if measured:
        return Fraction(measured[-1]), False
    seconds = last_step_seconds(trace)
    if seconds is None:
        raise UsageError(
            f"{whose} has no value for step_time: it was not measured, and its device has no time estimate"
        )
    return Fraction(seconds), True


def format_value(key: str, value: Fraction) -> str:
    """A value of a key as text: seconds for step_time, else bytes."""
    return format_seconds(float(value)) if key == "step_time" else format_bytes(int(value))
