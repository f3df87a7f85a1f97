"""Sizes written as text and read from text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscope.errors import UsageError
from memscope.units import (
    at_least,
    format_both,
    format_bytes,
    format_change,
    format_flop,
    format_flop_change,
    format_given,
    format_part,
    format_seconds,
    parse_budget,
    parse_bytes,
)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 2**10, "10.0 KiB"),
        # 9.996 KiB: two decimals would round to 10.00.
        (10236, "10.0 KiB"),
        (10230, "9.99 KiB"),
        # 1023.9 KiB is shown as such; one byte less than a MiB would round to 1024.0 KiB.
        (1_048_474, "1023.9 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (2**20, "1.00 MiB"),
        # 6,738,415,616 parameters of LLaMA2-7B in 4 bytes: 26,953,662,464 / 2³⁰ = 25.1026.
        (26_953_662_464, "25.1 GiB"),
        (3 * 2**40 // 2, "1.50 TiB"),
        (2**50, "1024.0 TiB"),
        (-1, "-1 B"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("change_bytes", "text"), [(0, "+0 B"), (5 * 2**28, "+1.25 GiB"), (-3 * 2**20, "-3.00 MiB"), (-1, "-1 B")]
)
def test_change_always_has_its_sign(change_bytes: int, text: str) -> None:
    assert format_change(change_bytes) == text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512", 512),
        ("512B", 512),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("64 MiB", 67_108_864),
        ("3MB", 3_000_000),
        ("40GB", 40_000_000_000),
        # 37.3 · 1,073,741,824 = 40,050,570,035.2
        ("37.3GiB", 40_050_570_035),
        (" 2 tib ", 2_199_023_255_552),
        ("2tb", 2_000_000_000_000),
        (".5KiB", 512),
        ("0.0006KB", 1),
    ],
)
def test_size_is_read_with_its_unit(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "forty", "-1GB", "+1GB", "1,5GB", "1e9", "nan", "inf", "GB", "1.GB", "4 0GB", "40GB!"]
)
def test_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert str(caught.value) == (
        f'"{text}" is not a size: expected a positive number with a unit, for example 40GB or 37.3GiB'
    )


@pytest.mark.parametrize(("text", "unit"), [("40G", "G"), ("40 XB", "XB"), ("1gigabyte", "gigabyte")])
def test_unknown_unit_is_refused_with_the_valid_ones(text: str, unit: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert str(caught.value) == (
        f'"{text}" has an unknown unit "{unit}": expected B, KB, MB, GB, TB, KiB, MiB, GiB or TiB'
    )


@pytest.mark.parametrize("text", ["0", "0GB", "0.4B", "0.0004KB"])
def test_zero_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f'"{text}" is zero bytes: expected a positive size, for example 40GB'):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400 + "KB", "9" * 5000, "0." + "0" * 400 + "1TB"])
def test_size_of_hundreds_of_digits_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert str(caught.value) == (
        f'"{text[:60]}…" is not a size: expected a positive number with a unit, for example 40GB or 37.3GiB'
    )


@pytest.mark.parametrize("text", [str(2**62), "4194304TiB", "9" * 40 + "KB"])
def test_size_that_no_device_has_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f'"{text}" is 4 EiB or more: expected the size of a memory'):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("40Gb", "40GB"), ("1.5 Mb", "1.5MB"), ("40Gib", "40GiB"), ("40Gbit", "40GB"), ("40 gibits", "40GiB"),
        ("512Kb", "512KB"),
    ],
)  # fmt: skip
def test_bits_are_refused_with_the_size_in_bytes_to_write(text: str, instead: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert str(caught.value) == f'"{text}" is in bits: expected bytes, with a capital B, as in {instead}'
    assert parse_bytes(instead) > 0


@pytest.mark.parametrize(("text", "size_bytes"), [("40gb", 40 * 10**9), ("40GB", 40 * 10**9), ("2kib", 2048)])
def test_a_size_in_lower_case_is_in_bytes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@given(st.integers(1, 2**62 - 1))
def test_plain_number_comes_back_exactly(size_bytes: int) -> None:
    assert parse_bytes(str(size_bytes)) == size_bytes


@given(st.integers(1, 2**49))
def test_shown_size_reads_back_within_half_of_its_last_digit(size_bytes: int) -> None:
    # The coarsest is 1.00 for 0.995 to 1.005.
    assert abs(parse_bytes(format_bytes(size_bytes)) - size_bytes) <= 0.005 * size_bytes + 1


@given(st.integers(1, 2**60))
def test_negative_size_is_the_positive_one_with_a_sign(size_bytes: int) -> None:
    assert format_bytes(-size_bytes) == "-" + format_bytes(size_bytes)


@pytest.mark.parametrize(
    ("given_as", "text", "both"),
    [
        # 40e9 / 2³⁰ = 37.253, 30,064,771,072 / 1e9 = 30.065, 500e6 / 2²⁰ = 476.84
        ("40GB", "40 GB", "40 GB (37.3 GiB)"),
        ("28GiB", "28.0 GiB", "28.0 GiB (30.06 GB)"),
        ("37.25GB", "37.25 GB", "37.25 GB (34.7 GiB)"),
        ("500MB", "500 MB", "500 MB (476.8 MiB)"),
        ("512MiB", "512.0 MiB", "512.0 MiB (536.87 MB)"),
        ("2TB", "2000 GB", "2000 GB (1.82 TiB)"),
    ],
)
def test_a_limit_is_shown_first_in_the_unit_in_which_it_was_given(given_as: str, text: str, both: str) -> None:
    assert format_given(parse_bytes(given_as)) == text
    assert format_both(parse_bytes(given_as)) == both


@given(st.integers(1, 2000))
def test_a_whole_number_of_units_comes_back_in_its_unit(count: int) -> None:
    assert format_given(count * 10**9) == f"{count} GB"
    assert format_given(count * 2**30).endswith("iB")


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (389 * 2**30 // 10, 40 * 2**30, "38.9 of 40.0 GiB"),
        (512 * 2**20, 40 * 2**30, "512.0 MiB of 40.0 GiB"),
    ],
)
def test_a_part_repeats_the_unit_only_where_it_differs(part: int, whole: int, text: str) -> None:
    assert format_part(part, whole) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 FLOP"),
        (999, "999 FLOP"),
        (1000, "1.00 kFLOP"),
        (999_940, "999.9 kFLOP"),
        # 999,960 would round to 1000.0 of its unit.
        (999_960, "1.00 MFLOP"),
        (14_700_000_000_000, "14.7 TFLOP"),
        (-4_390_000_000, "-4.39 GFLOP"),
        (2 * 10**18, "2000.0 PFLOP"),
    ],
)
def test_operations_have_the_unit_of_their_size(count: int, text: str) -> None:
    assert format_flop(count) == text


def test_a_change_in_operations_has_its_sign() -> None:
    assert (format_flop_change(10**12), format_flop_change(-(10**12))) == ("+1.00 TFLOP", "-1.00 TFLOP")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.000_000_25, "0.25 µs"),
        (0.000_812, "812 µs"),
        (0.000_999_4, "999 µs"),
        # 999.6 µs would round to 1000 of its unit.
        (0.000_999_6, "1.00 ms"),
        (0.0251, "25.1 ms"),
        (0.9996, "1.00 s"),
        (2.345, "2.35 s"),
        (12.34, "12.3 s"),
        (3720.0, "3,720 s"),
    ],
)
def test_times_have_three_digits_and_the_unit_of_their_size(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_budget_without_its_unit_is_refused() -> None:
    with pytest.raises(UsageError, match='a budget of "40" is 40 B: add a unit, for example 40GB'):
        parse_budget("40")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(40 * 2**30, "40.00GiB"), (40 * 2**30 + 1, "40.01GiB"), (1, "0.01MiB"), (2**30 - 1, "1024.00MiB")],
)
def test_a_budget_for_the_command_line_is_never_smaller_than_the_size(size_bytes, text):
    assert at_least(size_bytes) == text
    assert parse_bytes(text) >= size_bytes
