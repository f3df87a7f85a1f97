"""Settings as text: frozen dataclasses filled from `key=value` words, for targets and strategies alike."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from memscope.errors import UsageError, nearest

__all__ = ["fill", "format_value", "help_of", "non_defaults"]

T = TypeVar("T")
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def fill(config: type[T] | T, words: Mapping[str, str], *, of: str) -> T:
    """A settings dataclass with the fields in `words` set from text; the others keep the given instance's or class's values.

    Lists are joined by `+`; an optional field takes `none`. `of` names the owner in errors, e.g. `strategy "lora"`.

    Raises:
        UsageError: for an unknown key or a value of the wrong kind, with the nearest valid name.
    """
    base: Any = config() if isinstance(config, type) else config
    hints = typing.get_type_hints(type(base))
    names = [field.name for field in dataclasses.fields(base)]
    changes = {}
    for key, text in words.items():
        if key not in names:
            raise UsageError(f'{of} has no setting "{key}": {nearest(key, names)}')
        changes[key] = _value(text, hints[key], f'{of}: setting "{key}"')
    filled: T = dataclasses.replace(base, **changes)
    return filled


def _value(text: str, kind: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _value(text, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if text not in arguments:
            raise UsageError(f'{where} cannot be "{text}": {nearest(text, arguments)}')
        return text
    if origin is tuple:
        return tuple(_value(item, arguments[0], where) for item in text.split("+"))
    if kind is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise UsageError(f'{where} cannot be "{text}": expected true or false')
        return text.lower() in _TRUE
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise UsageError(f'{where} cannot be "{text}": expected {expected}') from None
    return kind(text)


def format_value(value: Any) -> str:
    """A setting as the text that `fill` reads back."""
    if isinstance(value, tuple):
        return "+".join(map(format_value, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def non_defaults(config: Any) -> dict[str, str]:
    """The settings that differ from the defaults, as text."""
    default = type(config)()
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: format_value(value) for name, value in values.items() if value != getattr(default, name)}


def help_of(config: type) -> dict[str, str]:
    """What each setting means: the docstring under its field, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, after in zip(body.body, [*body.body[1:], None], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            texts[field.target.id] = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
    return texts
