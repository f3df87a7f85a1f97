"""Sizes, times and operation counts as text.

GB is 10⁹ bytes and GiB is 2³⁰ bytes; both are read, and neither stands for the other.
"""

from __future__ import annotations

import re
from fractions import Fraction

from memscope.errors import UsageError, excerpt

__all__ = [
    "at_least",
    "format_both", "format_bytes", "format_change", "format_flop", "format_flop_change", "format_gb", "format_given",
    "format_part", "format_seconds", "parse_budget", "parse_bytes", "parse_seconds",
]  # fmt: skip

_SCALE = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SCALE |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_BINARY = (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40))
_FLOP = (("kFLOP", 10**3), ("MFLOP", 10**6), ("GFLOP", 10**9), ("TFLOP", 10**12), ("PFLOP", 10**15))
_LEAST_BUDGET = 2**20
_SECONDS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600}
_LONGEST_SECONDS = 10**6
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")
_BITS = re.compile(r"[KMGT]i?b|[KMGTkmgt]i?[Bb]its?")
"""Units of bits: `Gb`, `Gib`, `Gbit`. All in lower case, `gb` counts bytes, because people type sizes so."""
_LONGEST = 64
"""Characters of a size; more digits say nothing, and take time that grows with their square."""
_MOST_BYTES = 2**62
"""Upper bound on sizes, since a trace holds 64-bit integers and sums of them."""


def format_bytes(size_bytes: int) -> str:
    """`41.2 GiB`, `1.25 MiB`, `512 B`: binary units, with two decimals below 10 and one from there."""
    sign, rest = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    if rest < 1024:
        return f"{sign}{rest} B"
    for unit, scale in _BINARY:
        value = rest / scale
        if value < 1023.95 or unit == "TiB":
            return f"{sign}{_decimals(value)} {unit}"
    raise AssertionError("unreachable: TiB ends the loop")


def _decimals(value: float) -> str:
    return f"{value:.{1 if value >= 9.995 else 2}f}"


def format_change(change_bytes: int) -> str:
    """`+1.25 GiB` or `-3.00 MiB`: a difference, always with its sign."""
    return ("+" if change_bytes >= 0 else "") + format_bytes(change_bytes)


def format_part(part_bytes: int, whole_bytes: int) -> str:
    """`38.9 of 40.0 GiB`, or `512.0 MiB of 40.0 GiB` where the units differ."""
    part, whole = format_bytes(part_bytes), format_bytes(whole_bytes)
    unit = whole.rpartition(" ")[2]
    return f"{part.removesuffix(f' {unit}')} of {whole}"


def format_gb(size_bytes: int) -> str:
    """`40 GB`, `37.25 GB`, `500 MB`: decimal units, as budgets and clouds have them, with at most two decimals."""
    unit, scale = ("GB", 10**9) if size_bytes >= 10**9 else ("MB", 10**6)
    return f"{size_bytes / scale:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def format_given(size_bytes: int) -> str:
    """`40 GB`, `28.0 GiB`: a limit in the unit in which it was given.

    That is a decimal unit where two decimals of it are exact: no size that people give in binary units is.
    """
    return _both(size_bytes)[0]


def format_both(size_bytes: int) -> str:
    """`40 GB (37.3 GiB)`, `28.0 GiB (30.06 GB)`: a limit in both kinds of units, as it was given first."""
    first, second = _both(size_bytes)
    return f"{first} ({second})"


def _both(size_bytes: int) -> tuple[str, str]:
    decimal, binary = format_gb(size_bytes), format_bytes(size_bytes)
    number, unit = decimal.split()
    return (decimal, binary) if Fraction(number) * _SCALE[unit] == size_bytes else (binary, decimal)


def at_least(size_bytes: int) -> str:
    """`25.94GiB`: a size for the command line, rounded up to two decimals."""
    unit, scale = ("GiB", 2**30) if size_bytes >= 2**30 else ("MiB", 2**20)
    return f"{-(-size_bytes * 100 // scale) / 100:.2f}{unit}"


def format_flop(count: float) -> str:
    """`14.7 TFLOP`, `512 FLOP`: floating-point operations, with as many decimals as a size."""
    sign, rest = ("-", -count) if count < 0 else ("", count)
    if rest < 1000:
        return f"{sign}{rest:.0f} FLOP"
    for unit, scale in _FLOP:
        value = rest / scale
        if value < 999.95 or unit == "PFLOP":
            return f"{sign}{_decimals(value)} {unit}"
    raise AssertionError("unreachable: PFLOP ends the loop")


def format_flop_change(change: float) -> str:
    """`-14.7 TFLOP`: a difference, always with its sign."""
    return ("+" if change >= 0 else "") + format_flop(change)


def format_seconds(seconds: float) -> str:
    """`2.34 s`, `12.3 ms`, `812 µs`: three digits, and all digits before the decimal point."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} µs" if seconds else "0 s"


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"


def parse_budget(text: str) -> int:
    """Bytes of a device's memory, as `parse_bytes` reads them.

    Raises:
        UsageError: also when the size is below 1 MiB: most likely the unit is missing.
    """
    size_bytes = parse_bytes(text)
    if size_bytes < _LEAST_BUDGET:
        raise UsageError(f'a budget of "{text}" is {format_bytes(size_bytes)}: add a unit, for example 40GB')
    return size_bytes


def parse_bytes(text: str) -> int:
    """Bytes of `40GB`, `37.3GiB`, `512`, `64 MiB`.

    Raises:
        UsageError: when the number or its unit cannot be read, the unit counts bits (`40Gb`), or the size is zero or
            more than 4 EiB.
    """
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise UsageError(
            f'"{excerpt(text)}" is not a size: expected a positive number with a unit, for example 40GB or 37.3GiB'
        )
    number, unit = match.groups()
    if _BITS.fullmatch(unit):
        instead = f"{number}{unit[0].upper()}{'i' if unit[1] == 'i' else ''}B"
        raise UsageError(f'"{text}" is in bits: expected bytes, with a capital B, as in {instead}')
    scale = _SCALE.get(unit.upper() or "B")
    if scale is None:
        raise UsageError(f'"{text}" has an unknown unit "{unit}": expected B, KB, MB, GB, TB, KiB, MiB, GiB or TiB')
    size_bytes = round(Fraction(number) * scale)
    if size_bytes == 0:
        raise UsageError(f'"{text}" is zero bytes: expected a positive size, for example 40GB')
    if size_bytes >= _MOST_BYTES:
        raise UsageError(f'"{text}" is 4 EiB or more: expected the size of a memory, for example 40GB')
    return size_bytes


def parse_seconds(text: str) -> float:
    """Seconds of `90s`, `10min`, `1.5h`, `800ms`; at most eleven days.

    Raises:
        UsageError: when the number or its unit cannot be read, or the time is zero or too long.
    """
    match = _SIZE.fullmatch(text)
    scale = _SECONDS.get(match[2]) if match else None
    seconds = float(match[1]) * scale if match and scale else 0.0
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise UsageError(f'"{text}" is not a time: expected a positive number with ms, s, min or h, for example 90s')
    return seconds
