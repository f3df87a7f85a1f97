"""Sizes as people write and read them.

GB is 10⁹ bytes, GiB is 2³⁰; both are understood, neither stands for the other.
"""

from __future__ import annotations

import re
from fractions import Fraction

from memscope.errors import UsageError

__all__ = ["format_bytes", "format_change", "format_gb", "parse_budget", "parse_bytes"]

_SCALE = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SCALE |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LEAST_BUDGET = 2**20
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def format_bytes(size_bytes: int) -> str:
    """`41.2 GiB`, `1.25 MiB`, `512 B`: in binary units, with two decimals below 10 and one from there."""
    sign, rest = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    if rest < 1024:
        return f"{sign}{rest} B"
    for unit, scale in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40)):
        value = rest / scale
        if value < 1023.95 or unit == "TiB":
            return f"{sign}{value:.{1 if value >= 9.995 else 2}f} {unit}"
    raise AssertionError("unreachable: TiB ends the loop")


def format_change(change_bytes: int) -> str:
    """`+1.25 GiB` or `-3.00 MiB`: a difference, always with its sign."""
    return ("+" if change_bytes >= 0 else "") + format_bytes(change_bytes)


def format_gb(size_bytes: int) -> str:
    """`40 GB`, `37.25 GB`: in decimal gigabytes, as budgets and clouds have them, with at most two decimals."""
    return f"{size_bytes / 1e9:.2f}".rstrip("0").rstrip(".") + " GB"


def parse_budget(text: str) -> int:
    """Bytes of a device's memory, as `parse_bytes` reads them.

    Raises:
        UsageError: also when there is less than no device has: most likely the unit was forgotten.
    """
    size_bytes = parse_bytes(text)
    if size_bytes < _LEAST_BUDGET:
        raise UsageError(f'a budget of "{text}" is {format_bytes(size_bytes)}: give it a unit, for example 40GB')
    return size_bytes


def parse_bytes(text: str) -> int:
    """Bytes of `40GB`, `37.3GiB`, `512`, `64 MiB`.

    Raises:
        UsageError: when the number or its unit cannot be read, or the size is zero.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f'"{text}" is not a size: expected a positive number with a unit, for example 40GB or 37.3GiB')
    number, unit = match.groups()
    scale = _SCALE.get(unit.upper() or "B")
    if scale is None:
        raise UsageError(f'"{text}" has an unknown unit "{unit}": expected B, KB, MB, GB, TB, KiB, MiB, GiB or TiB')
    size_bytes = round(Fraction(number) * scale)
    if size_bytes == 0:
        raise UsageError(f'"{text}" is zero bytes: expected a positive size, for example 40GB')
    return size_bytes
