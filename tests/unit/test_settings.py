"""Settings read from text and written as text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscope.errors import UsageError
from memscope.workload.settings import (
    bare_words,
    choice,
    fill,
    format_value,
    help_of,
    is_switch,
    non_defaults,
    other_settings,
    plan_words,
    setting,
    setting_text,
)


@dataclass(frozen=True)
class Point:
    x: int
    y: int


@dataclass(frozen=True)
class Config:
    """One field of every kind."""

    layers: int = 2
    """How many blocks
    the model has."""
    rate: float = 1e-5
    "Learning rate."
    name: str = "model"
    shuffle: bool = True
    """Whether order is random."""
    data: Path = Path("data.json")
    dtype: Literal["fp16", "bf16"] = "fp16"
    stage: Literal[0, 1, None] = 0
    limit: int | None = None
    word: Optional[str] = "x"  # noqa: UP045 - both spellings of an optional field
    window: int | Literal["all"] = "all"
    heads: tuple[int, ...] = (1, 2)
    betas: tuple[float, float] = (0.9, 0.999)
    targets: list[str] = field(default_factory=list)
    words: tuple = ()  # type: ignore[type-arg]
    point: Point | None = None
    total: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError("layers must not be negative")


def set_to(**words: str) -> Config:
    return fill(Config, words, of='target "mine"')


def refusal(**words: str) -> str:
    with pytest.raises(UsageError) as caught:
        set_to(**words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("layers", "12", 12), ("layers", "-0", 0), ("rate", "3", 3.0), ("rate", "2.5e-4", 2.5e-4),
        ("name", "a b", "a b"), ("name", "none", "none"), ("shuffle", "off", False),
        ("data", "sets/a.json", Path("sets/a.json")), ("dtype", "bf16", "bf16"), ("stage", "1", 1),
        ("stage", "none", None),
        ("limit", "7", 7), ("limit", "none", None), ("limit", "None", None), ("word", "none", None), ("word", "y", "y"),
        ("window", "16", 16), ("window", "all", "all"), ("heads", "4+8+16", (4, 8, 16)), ("heads", "4", (4,)),
        ("heads", "", ()), ("betas", "0.8+0.95", (0.8, 0.95)), ("targets", "wq+wv", ["wq", "wv"]),
        ("words", "a+b", ("a", "b")),
    ],
)  # fmt: skip
def test_every_kind_is_read_from_text(key: str, text: str, value: Any) -> None:
    found = getattr(set_to(**{key: text}), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["true", "Yes", "ON", "1"])
def test_true_has_four_spellings(text: str) -> None:
    assert fill(Config(shuffle=False), {"shuffle": text}, of="it").shuffle is True


@pytest.mark.parametrize("text", ["false", "No", "OFF", "0"])
def test_false_has_four_spellings(text: str) -> None:
    assert set_to(shuffle=text).shuffle is False


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("layers", "2.5", "expected a whole number"),
        ("layers", "many", "expected a whole number"),
        ("layers", "none", "expected a whole number"),
        ("rate", "fast", "expected a number"),
        ("shuffle", "maybe", "expected true or false"),
        ("point", "3", "expected Point"),
        ("dtype", "bf61", 'did you mean "bf16"? Valid: bf16, fp16'),
        ("stage", "2", "Valid: 0, 1, none"),
        ("limit", "few", "expected a whole number"),
        ("window", "al", 'did you mean "all"? Valid: all'),
        ("window", "none", "Valid: all"),
        ("betas", "0.9", "expected 2 values joined by +"),
        ("betas", "0.9+0.99+0.999", "expected 2 values joined by +"),
    ],
)
def test_wrong_value_is_refused_with_the_expected_kind(key: str, text: str, expected: str) -> None:
    message = refusal(**{key: text})
    assert message.startswith(f'target "mine": setting "{key}" cannot be "{text}": ')
    assert message.endswith(expected)


@dataclass(frozen=True)
class Switches:
    one: bool = False
    other: bool | None = None
    text: str = ""
    optional: int | None = None


def test_a_switch_may_be_named_alone() -> None:
    assert fill(Switches, {"one": None, "other": None}, of="it") == Switches(one=True, other=True)
    assert fill(Switches(one=True), {"other": None}, of="it") == Switches(one=True, other=True)


def test_only_bools_are_switches() -> None:
    assert [is_switch(Switches, key) for key in ("one", "other", "text", "optional", "absent")] == [True, True] + [
        False
    ] * 3
    assert is_switch(Switches(), "one")
    for key in ("text", "optional"):
        with pytest.raises(UsageError) as caught:
            fill(Switches, {key: None}, of='target "mine"')
        assert str(caught.value) == f'target "mine": setting "{key}" is not a switch: write {key}=VALUE'


@dataclass(frozen=True)
class Open:
    method: str = choice("ia3")
    targets: str = "auto"
    on: bool = False
    fields: tuple[tuple[str, str], ...] = other_settings()


def test_a_bare_word_sets_its_field_and_other_settings_are_kept_as_text() -> None:
    filled = fill(Open, {"vera": None, "r": "256", "targets": "q", "seed": "1"}, of="it")
    assert filled == Open("vera", "q", False, (("r", "256"), ("seed", "1")))
    assert fill(Open, {"on": None}, of="it") == Open(on=True)
    assert plan_words(filled) == ["vera", "targets=q", "r=256", "seed=1"]
    assert plan_words(Open()) == ["ia3"]
    shown = [setting_text(Open, field) for field in fields(Open)]
    assert shown == ["METHOD (ia3)", "targets=auto", "on=false", "KEY=VALUE"]


def test_wrong_item_of_a_list_is_named() -> None:
    assert refusal(heads="4+x+8") == 'target "mine": setting "heads" cannot be "x": expected a whole number'
    assert refusal(heads="4++8") == 'target "mine": setting "heads" cannot be "": expected a whole number'


def test_unknown_key_is_refused_with_the_nearest_name() -> None:
    message = refusal(layer="3")
    assert message.startswith('target "mine" has no setting "layer": did you mean "layers"? Valid: betas, data, dtype,')


def test_field_outside_the_constructor_is_not_a_setting() -> None:
    message = refusal(total="3")
    assert message.startswith('target "mine" has no setting "total"')
    assert "total" not in message.partition("Valid: ")[2].split(", ")


def test_value_that_the_dataclass_refuses_is_a_wrong_setting() -> None:
    assert refusal(layers="-1") == 'target "mine" rejects these settings: layers must not be negative'


def test_other_fields_keep_the_values_of_the_instance() -> None:
    given = Config(layers=5, name="big")
    filled = fill(given, {"rate": "1"}, of="it")
    assert filled == Config(layers=5, name="big", rate=1.0)
    assert given == Config(layers=5, name="big")


def test_without_words_nothing_changes() -> None:
    assert fill(Config, {}, of="it") == Config()


def test_values_are_written_as_people_write_them() -> None:
    assert [format_value(value) for value in (3, 0.5, 1e-5, 1e16, "a")] == ["3", "0.5", "1e-05", "1e16", "a"]
    assert [format_value(value) for value in (True, False, None)] == ["true", "false", "none"]
    assert [format_value(value) for value in ((1, 2), ["wq"], (), (True, None))] == ["1+2", "wq", "", "true+none"]


_NAMES = st.text("abcw_", min_size=1)


@given(
    st.builds(
        Config,
        layers=st.integers(0), rate=st.floats(allow_nan=False), name=st.text(), shuffle=st.booleans(),
        dtype=st.sampled_from(["fp16", "bf16"]), stage=st.sampled_from([0, 1, None]), limit=st.none() | st.integers(),
        window=st.just("all") | st.integers(), heads=st.lists(st.integers()).map(tuple),
        betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), targets=st.lists(_NAMES),
    )
)  # fmt: skip
def test_written_settings_read_back_the_same(config: Config) -> None:
    assert fill(Config, non_defaults(config), of="it") == config


def test_non_defaults_omits_unchanged_fields() -> None:
    assert non_defaults(Config()) == {}
    assert non_defaults(Config(layers=2, rate=0.5, limit=3, shuffle=False, heads=(1,))) == {
        "rate": "0.5", "shuffle": "false", "limit": "3", "heads": "1",
    }  # fmt: skip


def test_help_is_the_docstring_under_each_field_on_one_line() -> None:
    texts = help_of(Config)
    assert list(texts) == [each.name for each in fields(Config)]
    assert {name: text for name, text in texts.items() if text} == {
        "layers": "How many blocks the model has.",
        "rate": "Learning rate.",
        "shuffle": "Whether order is random.",
    }


def test_help_of_a_dataclass_inside_a_class() -> None:
    class Outer:
        @dataclass(frozen=True)
        class Config:
            r: int = 16
            """Rank."""
            last: int = 0

    assert help_of(Outer.Config) == {"r": "Rank.", "last": ""}


def test_help_ignores_other_constants_under_a_field() -> None:
    class Config:
        r: int = 16
        ...

    assert help_of(Config) == {"r": ""}


@dataclass(frozen=True)
class Dashed:
    layer_list: str = setting("layer-list", "")
    """List of layers."""
    all_of_it: bool = setting("all-of-it", False)


def test_a_setting_may_be_written_otherwise_than_its_field() -> None:
    given = Dashed(layer_list="transformer.h", all_of_it=True)
    assert fill(Dashed, {"layer-list": "transformer.h", "all-of-it": None}, of="it") == given
    assert non_defaults(given) == {"layer-list": "transformer.h", "all-of-it": "true"}
    assert is_switch(Dashed, "all-of-it")
    assert not is_switch(Dashed, "all_of_it")


def test_the_name_of_the_field_is_then_no_setting() -> None:
    with pytest.raises(UsageError, match=r'it has no setting "layer_list": did you mean "layer-list"\?'):
        fill(Dashed, {"layer_list": "h"}, of="it")


@dataclass(frozen=True)
class Chosen:
    kind: Literal["small", "very-large"] | None = choice()
    fast: bool = False
    usual: bool = True
    count: int = 1


def test_the_value_of_a_choice_and_a_switch_stand_alone() -> None:
    assert bare_words(Chosen) == ["small", "very-large", "fast", "usual"]
    assert fill(Chosen, {"very-large": None, "fast": None}, of="it") == Chosen("very-large", fast=True)
    with pytest.raises(UsageError, match='it cannot be both "small" and "very-large": choose one'):
        fill(Chosen, {"small": None, "very-large": None}, of="it")
    with pytest.raises(UsageError, match=r'it has no setting "kind": Valid: count, fast, small, usual, very-large'):
        fill(Chosen, {"kind": "small"}, of="it")


def test_the_words_of_a_plan_begin_with_those_that_stand_alone() -> None:
    config = Chosen("small", fast=True, usual=False, count=2)
    assert plan_words(config) == ["small", "fast", "usual=false", "count=2"]
    assert plan_words(config, taken={"fast", "small"}) == ["small", "fast=true", "usual=false", "count=2"]
    assert plan_words(Chosen(fast=True), taken={"fast"}) == ["fast"]  # directly after the colon, it is clear
