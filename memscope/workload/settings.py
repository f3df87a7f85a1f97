"""Settings as text: frozen dataclasses filled from `key=value` words, for targets and strategies alike."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union, overload

from memscope.errors import UsageError, nearest

__all__ = [
    "bare_words",
    "choice",
    "fill",
    "format_value",
    "help_of",
    "is_switch",
    "non_defaults",
    "other_settings",
    "plan_words",
    "read_value",
    "setting",
    "setting_name",
    "setting_text",
]

T = TypeVar("T")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NAME = "memscope setting"
_CHOICE, _OTHERS = "memscope choice", "memscope other settings"
_EXPECTED = {int: "a whole number", float: "a number"}


def setting(name: str, default: Any) -> Any:
    """A field whose setting has another name, such as `layer-list` for the field `layer_list`."""
    return dataclasses.field(default=default, metadata={_NAME: name})


def choice(default: Any = None) -> Any:
    """A field whose value is written without its name, such as `adamw` in `optim:adamw`.

    A Literal lists the words; a str takes any word directly after the colon; None: no word.
    """
    return dataclasses.field(default=default, metadata={_CHOICE: True})


def other_settings() -> Any:
    """A field `tuple[tuple[str, str], ...]` for all settings that the dataclass does not name, as text by key."""
    return dataclasses.field(default=(), metadata={_OTHERS: True})


def setting_name(field: dataclasses.Field[Any]) -> str:
    """The name of a field's setting, in texts and in errors: that of the field unless `setting` gave it another."""
    name: str = field.metadata.get(_NAME, field.name)
    return name


def setting_text(config: type, field: dataclasses.Field[Any]) -> str:
    """A setting as help texts show it: `r=16`, the words of a choice, or KEY=VALUE for the settings without names."""
    if _OTHERS in field.metadata:
        return "KEY=VALUE"
    default = format_value(getattr(config(), field.name))
    if _CHOICE in field.metadata:
        return " | ".join(_choices(config)) or f"{field.name.upper()} ({default})"
    return f"{setting_name(field)}={default}"


@overload
def fill(config: type[T], words: Mapping[str, str | None], *, of: str) -> T: ...
@overload
def fill(config: T, words: Mapping[str, str | None], *, of: str) -> T: ...
def fill(config: type[T] | T, words: Mapping[str, str | None], *, of: str) -> T:
    """Set the fields in `words` of a settings dataclass from text; the other fields keep the values of `config`.

    None in place of a text means that the word stands alone: a switch (a bool) to turn on, or the value of a `choice`.
    Settings that no field names go to the field of `other_settings`, if there is one.

    A field may be a bool, int, float or str, any other type whose constructor takes one text, a Literal, a list or
    tuple of these (items joined by `+`), or optional (`none`). `of` names the owner in errors, e.g. `strategy "lora"`.

    Raises:
        UsageError: a key is unknown (the message offers the nearest), a value has the wrong type, or the dataclass
            itself rejects the settings with a ValueError.
    """
    base: Any = config() if isinstance(config, type) else config
    hints = typing.get_type_hints(type(base))
    named = [field for field in dataclasses.fields(base) if field.init and _CHOICE not in field.metadata]
    fields = {setting_name(field): field.name for field in named}
    choices, any_word, others = _choices(base), _any_word(base), _marked(base, _OTHERS)
    changes: dict[str, Any] = {}
    for key, text in words.items():
        chosen = choices.get(key, None if is_switch(base, key) else any_word)
        if text is None and chosen:
            if chosen in changes:
                raise UsageError(f'{of} cannot be both "{changes[chosen]}" and "{key}": choose one')
            changes[chosen] = key
            continue
        if text is not None and others and key not in fields:
            changes[others] = (*changes.get(others, ()), (key, text))
            continue
        if key not in fields:
            raise UsageError(f'{of} has no setting "{key}": {nearest(key, [*choices, *fields])}')
        where = f'{of}: setting "{key}"'
        if text is None and not is_switch(base, key):
            raise UsageError(f"{where} is not a switch: write {key}=VALUE")
        changes[fields[key]] = read_value("true" if text is None else text, hints[fields[key]], where)
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


def bare_words(config: Any) -> list[str]:
    """The words that are settings by themselves: the values of a `choice`, and the switches."""
    switches = [name for name in map(setting_name, dataclasses.fields(config)) if is_switch(config, name)]
    return [*_choices(config), *switches]


def _choices(config: Any) -> dict[str, str]:
    """The values of each field that was made by `choice`, with the name of the field."""
    hints = typing.get_type_hints(config if isinstance(config, type) else type(config))
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        if _CHOICE in field.metadata:
            kinds = [hints[field.name], *typing.get_args(hints[field.name])]
            literals = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal]
            found |= {format_value(value): field.name for values in literals for value in values}
    return found


def _any_word(config: Any) -> str | None:
    """Name of the field that takes any word that stands alone."""
    name = _marked(config, _CHOICE)
    return name if name and name not in _choices(config).values() else None


def _marked(config: Any, mark: str) -> str | None:
    """Name of the field with a mark."""
    return next((field.name for field in dataclasses.fields(config) if mark in field.metadata), None)


def read_value(text: str, kind: Any, where: str) -> Any:
    """A text as a value of a type that `fill` knows.

    Raises:
        UsageError: the text is no such value; the message begins with `where`.
    """
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
            return read_value(text, kind, where)
        except UsageError:
            continue
    return read_value(text, last, where)


def _items(text: str, kinds: tuple[Any, ...], where: str) -> list[Any]:
    """The items of a list; `kinds` are the arguments of `list[kind]`, `tuple[kind, ...]` or `tuple[kind, kind]`.

    Without arguments (a bare `list` or `tuple`), items stay text.
    """
    items = text.split("+") if text else []
    any_number = len(kinds) < 2 or kinds[1] is Ellipsis
    if not any_number and len(items) != len(kinds):
        raise UsageError(f'{where} cannot be "{text}": expected {len(kinds)} values joined by +')
    each = [kinds[0] if kinds else str] * len(items) if any_number else kinds
    return [read_value(item, kind, where) for item, kind in zip(items, each, strict=True)]


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
    texts: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if _OTHERS in field.metadata:
            texts |= dict(value)
        elif value != getattr(default, field.name):
            texts[setting_name(field)] = format_value(value)
    return texts


def plan_words(config: Any, taken: Collection[str] = ()) -> list[str]:
    """The settings that differ from the defaults, as the words of a plan, and first the word of a choice, if any.

    Args:
        config: the settings.
        taken: words that mean something else after a comma; a switch of that name is written `KEY=true`.
    """
    chosen = _marked(config, _CHOICE)
    word = getattr(config, chosen) if chosen else None
    alone, valued = [format_value(word)] if word is not None else [], []
    for key, text in non_defaults(config).items():
        if text == "true" and is_switch(config, key) and not (alone and key in taken):
            alone.append(key)
        elif key != chosen:
            valued.append(f"{key}={text}")
    return [*alone, *valued]


def help_of(config: type) -> dict[str, str]:
    """The help text of each setting: the docstring under its field, on one line; empty if it has no docstring."""
    texts: dict[str, str] = {}
    for one in reversed(config.__mro__[:-1]):  # a field may be inherited
        texts |= _docstrings_of_fields(one)
    return texts


def _docstrings_of_fields(config: type) -> dict[str, str]:
    texts: dict[str, str] = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            texts[field.target.id] = _docstring(after)
    return texts


def _docstring(statement: ast.stmt | None) -> str:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return " ".join(value.value.split()) if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
