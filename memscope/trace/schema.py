"""Check the values of a file against a declared schema, and say which field is wrong.

A schema is a `TypedDict`; `msgspec` compares. Fields that a schema does not declare are allowed: a later version of
memscope may add some (docs/design/0007-how-files-are-checked.md).
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from memscope.errors import excerpt

__all__ = ["Count", "Seconds", "SizeBytes", "mismatch"]

SizeBytes = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
"""A number of bytes; a trace holds 64-bit integers and sums of them."""
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""A time; neither infinite nor NaN."""

_PLACE = re.compile(r" - at `(?P<path>.*)`$", re.DOTALL)
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_WORDS = {"object": "an object", "array": "a list", "null": "null", "str": "a string", "int": "a whole number"}
_WORDS |= {"float": "a number", "bool": "true or false"}


def mismatch(value: Any, schema: Any) -> str:
    """Say where a value differs from a schema: `meta.device.name is 3: expected a string`; empty if it does not."""
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        return _told(value, str(error))
    except RecursionError:
        return "it is nested too deep"
    return ""


def _told(value: Any, message: str) -> str:
    found = _PLACE.search(message)
    path = found["path"] if found else "$"
    reason = message[: found.start()] if found else message
    name = path.removeprefix("$").removeprefix(".") or "the file"
    missing = _MISSING.fullmatch(reason)
    if missing:
        return f"{name} has no {missing[1]}"
    expected = reason.partition(", got ")[0]
    if expected.startswith("Invalid enum value"):
        expected = "expected one of the names that memscope writes"
    expected = re.sub(r"`([^`]*)`", lambda types: _words(types[1]), expected)
    if name.startswith("key` in `$"):  # an object whose keys are fixed
        return f"a key of {name.removeprefix('key` in `$').removeprefix('.')}: {expected}"
    known, at = _at(value, path)
    return f"{name}{f' is {_quoted(at)}' if known else ''}: {expected[:1].lower()}{expected[1:]}"


def _words(types: str) -> str:
    return " or ".join(_WORDS.get(name, name) for name in types.split(" | "))


def _at(value: Any, path: str) -> tuple[bool, Any]:
    """The value at a path of msgspec, which names no keys of dicts with any keys (`[...]`)."""
    rest = path.removeprefix("$")
    while rest:
        step = _STEP.match(rest)
        if step is None:
            return False, None
        value, rest = value[step[1] or int(step[2])], rest[step.end() :]
    return True, value


def _quoted(value: Any) -> str:
    return f'"{excerpt(value)}"' if isinstance(value, str) else excerpt(value)
