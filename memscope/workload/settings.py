"""Settings as text: frozen dataclasses filled from `key=value` words, for targets and strategies alike."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, overload

from memscope.errors import UsageError, nearest

__all__ = ["fill", "format_value", "help_of", "is_switch", "non_defaults", "setting", "setting_name"]

T = TypeVar("T")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NAME = "memscope setting"
_EXPECTED = {int: "a whole number", float: "a number"}


def setting(name: str, default: Any) -> Any:
    """A field whose setting has another name, such as `layer-list` for the field `layer_list`."""
    return dataclasses.field(default=default, metadata={_NAME: name})


def setting_name(field: dataclasses.Field[Any]) -> str:
    """The name of a field's setting, in texts and in errors: that of the field unless `setting` gave it another."""
    name: str = field.metadata.get(_NAME, field.name)
    return name


@overload
def fill(config: type[T], words: Mapping[str, str | None], *, of: str) -> T: ...
@overload
def fill(config: T, words: Mapping[str, str | None], *, of: str) -> T: ...
def fill(config: type[T] | T, words: Mapping[str, str | None], *, of: str) -> T:
    """Set the fields in `words` of a settings dataclass from text; the other fields keep the values of `config`.

    None in place of a text turns a switch (a bool) on.

    A field may be a bool, int, float or str, any other type whose constructor takes one text, a Literal, a list or
    tuple of these (items joined by `+`), or optional (`none`). `of` names the owner in errors, e.g. `strategy "lora"`.

    Raises:
        UsageError: a key is unknown (the message offers the nearest), a value has the wrong type, or the dataclass
            itself rejects the settings with a ValueError.
    """
    base: Any = config() if isinstance(config, type) else config
    hints = typing.get_type_hints(type(base))
    fields = {setting_name(field): field.name for field in dataclasses.fields(base) if field.init}
    changes = {}
    for key, text in words.items():
        if key not in fields:
            raise UsageError(f'{of} has no setting "{key}": {nearest(key, fields)}')
        where = f'{of}: setting "{key}"'
        if text is None and not is_switch(base, key):
            raise UsageError(f"{where} is not a switch: write {key}=VALUE")
        changes[fields[key]] = _value("true" if text is None else text, hints[fields[key]], where)
    try:
        filled: T = dataclasses.replace(base, **changes)
    except ValueError as error:
        raise UsageError(f"{of} rejects these settings: {error}") from error
    return filled


def is_switch(config: Any, key: str) -> bool:
    """Whether a settings dataclass, or an instance of one, has a bool or optional bool setting of this name."""
    hints = typing.get_type_hints(config if isinstance(config, type) else type(config))
    kind = next((hints[field.name] for field in dataclasses.fields(config) if setting_name(field) == key), None)
    return kind is bool or (typing.get_origin(kind) in (Union, types.UnionType) and bool in typing.get_args(kind))


def _value(text: str, kind: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(text, arguments, where)
    if origin is Literal:
        choices = {format_value(choice): choice for choice in arguments}
        if text not in choices:
            raise UsageError(f'{where} cannot be "{text}": {nearest(text, choices)}')
        return choices[text]
    if origin in (tuple, list):
        return origin(_items(text, arguments, where))
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise UsageError(f'{where} cannot be "{text}": expected true or false')
        return _BOOLEANS[text.lower()]
    try:
        return kind(text)
    except (TypeError, ValueError):
        expected = _EXPECTED.get(kind) or getattr(kind, "__name__", kind)
        raise UsageError(f'{where} cannot be "{text}": expected {expected}') from None


def _one_of(text: str, kinds: tuple[Any, ...], where: str) -> Any:
    """The text as the first type that accepts it; if no type does, the error of the last one."""
    if types.NoneType in kinds and text.lower() == "none":
        return None
    *first, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in first:
        try:
            return _value(text, kind, where)
        except UsageError:
            continue
    return _value(text, last, where)


def _items(text: str, kinds: tuple[Any, ...], where: str) -> list[Any]:
    """The items of a list; `kinds` are the arguments of `list[kind]`, `tuple[kind, ...]` or `tuple[kind, kind]`.

    Without arguments (a bare `list` or `tuple`), items stay text.
    """
    items = text.split("+") if text else []
    any_number = len(kinds) < 2 or kinds[1] is Ellipsis
    if not any_number and len(items) != len(kinds):
        raise UsageError(f'{where} cannot be "{text}": expected {len(kinds)} values joined by +')
    each = [kinds[0] if kinds else str] * len(items) if any_number else kinds
    return [_value(item, kind, where) for item, kind in zip(items, each, strict=True)]


def format_value(value: Any) -> str:
    """Format a setting as text that `fill` reads back."""
    if isinstance(value, tuple | list):
        return "+".join(map(format_value, value))
    if isinstance(value, float):
        return str(value).replace("e+", "e")  # in a list, 1e+16 would be read as two items
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def non_defaults(config: Any) -> dict[str, str]:
    """The settings that differ from the defaults, as text."""
    default = type(config)()
    values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        setting_name(field): format_value(value)
        for field, value in values.items()
        if value != getattr(default, field.name)
    }


def help_of(config: type) -> dict[str, str]:
    """The help text of each setting: the docstring under its field, on one line; empty if it has no docstring.

    Settings that a class inherits come first, as in `dataclasses.fields`.
    """
    texts: dict[str, str] = {}
    for inherited in config.__bases__:
        texts |= help_of(inherited) if dataclasses.is_dataclass(inherited) else {}
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            texts[field.target.id] = _docstring(after)
    return texts


def _docstring(statement: ast.stmt | None) -> str:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return " ".join(value.value.split()) if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
