"""Suggestions in error messages, and the location of an error."""

from __future__ import annotations

import pytest

from memscope.errors import excerpt, nearest, where


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
