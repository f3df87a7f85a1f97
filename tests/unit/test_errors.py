"""Suggestions in error messages, and the location of an error."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from torch import nn

from memscope.errors import excerpt, nearest, place, place_of, where


@pytest.mark.parametrize(
    ("given", "offered"),
    [
        ("a100", 'did you mean "a100-40gb" or "a100-80gb"? '),  # not a10g, which differs in equally few letters
        ("A100-8", 'did you mean "a100-80gb"? '),
        ("h100", 'did you mean "h100-80gb"? '),
        ("a10", 'did you mean "a100-40gb" or "a100-80gb" or "a10g"? '),
        ("a10b", 'did you mean "a10g"? '),
        ("tpu", ""),
        ("", ""),
    ],
)
def test_names_that_begin_with_the_given_text_are_nearest(given: str, offered: str) -> None:
    names = ["a100-40gb", "a100-80gb", "a10g", "h100-80gb"]
    assert nearest(given, names) == f"{offered}Valid: a100-40gb, a100-80gb, a10g, h100-80gb"


def test_an_error_is_located_in_the_users_own_code() -> None:
    import torch

    def mine() -> None:
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError) as caught:
        mine()
    assert where(caught.value).endswith("in mine: torch.ones(2) @ torch.ones(3))")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("layers.0", "layers.0"),
        ("x" * 100_000, "x" * 60 + "…"),
        ("two\nlines\x1b[31m", r"two\nlines\x1b[31m"),
        (3, "3"),
        (10**100, "a number of more than 60 digits"),
        (b"ab", "b'ab'"),
        ([1, 2], "a list of 2"),
        ({}, "an empty object"),
        (None, "None"),
    ],
)
def test_a_value_of_a_file_is_shown_on_one_short_line(value: object, shown: str) -> None:
    assert excerpt(value) == shown


class Passes(click.ParamType):
    """Raises inside an installed package, which calls it."""

    def convert(self, value: object, param: object, ctx: object) -> object:
        return json.loads("{")


OPTION = click.Option(["-x"], type=Passes())
FAILS: dict[str, tuple[Callable[[], object], str]] = {
    "standard library": (lambda: json.loads("{"), 'json.loads("{")'),
    "installed package": (lambda: click.IntRange(1, 2)("three"), 'click.IntRange(1, 2)("three")'),
    "called by a package": (lambda: OPTION.type_cast_value(click.Context(click.Command("x")), 1), "return json.loads"),
    "PyTorch": (lambda: nn.Linear(2, 2)("text"), 'nn.Linear(2, 2)("text")'),
}


@pytest.mark.parametrize(("fails", "line"), FAILS.values(), ids=FAILS)
def test_an_error_inside_a_library_is_located_in_the_callers_line(fails: Callable[[], object], line: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (of any library)
        fails()
    assert f"(at {__file__}:" in where(caught.value)
    assert line in where(caught.value)


def test_installed_code_is_named_where_there_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    frames = [(str(tmp_path / "lib" / "a.py"), 2, "g"), (str(tmp_path / "lib" / "b.py"), 3, "h")]
    assert place(frames).startswith(f" (at {tmp_path}/lib/a.py:2, in g:")
    assert place([*frames, ("/home/me/train.py", 4, "main")]).startswith(" (at /home/me/train.py:4, in main:")
    assert place([]) == ""


def test_a_function_is_located_where_it_is_defined() -> None:
    def loss(model: object) -> None: ...

    for one in (loss, functools.partial(loss, None), functools.wraps(loss)(lambda model: loss(model))):
        assert f"(at {__file__}:{loss.__code__.co_firstlineno}, in loss: def loss(" in place_of(one)
    assert place_of(len) == ""
