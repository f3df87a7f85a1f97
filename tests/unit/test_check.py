"""Limits as text, and traces checked against them."""

from fractions import Fraction

import pytest
from traces import TraceBuilder

from memscope.analysis.check import TraceLimit, budget_verdict, check
from memscope.errors import UsageError
from memscope.trace import Trace

MIB = 2**20


def trace(activation: int, seconds: list[float] | None = None) -> Trace:
    builder = TraceBuilder()
    builder.phase("forward", 0)
    builder.new("parameter", 100 * MIB)
    builder.free(builder.new("activation", activation))
    return builder.trace({"seconds": seconds})


def holds(limit: str, found: Trace, baseline: Trace | None = None) -> bool:
    (verdict,) = check(found, [TraceLimit.parse(limit)], baseline)
    return verdict.holds


def test_an_absolute_limit_holds_up_to_the_very_byte():
    assert holds("peak:150MiB", trace(50 * MIB))
    assert not holds("peak:150MiB", trace(50 * MIB + 1))


def test_a_share_is_of_the_baseline():
    # 105 % of 200 MiB are 210 MiB.
    assert holds("peak:+5%", trace(110 * MIB), trace(100 * MIB))
    assert not holds("peak:+5%", trace(110 * MIB + 1), trace(100 * MIB))


def test_a_growth_in_bytes_is_on_top_of_the_baseline():
    assert holds("activation:+2MiB", trace(12 * MIB), trace(10 * MIB))
    assert not holds("activation:+2MiB", trace(12 * MIB + 1), trace(10 * MIB))


def test_zero_growth_can_be_required():
    assert holds("peak:+0%", trace(MIB), trace(MIB))
    assert not holds("peak:+0%", trace(MIB + 1), trace(MIB))


def test_step_time_is_that_of_the_last_step():
    assert holds("step time:800ms", trace(MIB, [9.0, 0.75]))
    assert not holds("step_time:+5%", trace(MIB, [1.0, 1.06]), trace(MIB, [1.0, 1.0]))


def test_a_budget_limits_allocated_memory_if_reserved_memory_is_unknown():
    verdict = budget_verdict(trace(50 * MIB), 150 * MIB)
    assert verdict.key == "peak"
    assert verdict.holds
    assert verdict.value == Fraction(150 * MIB)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("peak", "expected KEY:LIMIT, for example peak:40GB"),
        ("peak:", "expected KEY:LIMIT"),
        ("peek:40GB", 'cannot limit "peek": did you mean "peak"?'),
        ("peak:40", "has no unit: write peak:40GB"),
        ("peak:40Gb/s", "is not a size"),
        ("peak:40parsec", 'unknown unit "parsec": expected B, KB, MB, GB'),
        ("peak:5%", "a percentage must be a growth over a baseline: write peak:+5%"),
        ("peak:-5%", "is not a size"),
        ("peak:3s", 'unknown unit "s"'),
        ("step_time:40GB", "expected seconds, for example step_time:2.5s"),
        ("peak:40Gb", "in bits: expected bytes, with a capital B, as in 40GB"),
        (f"peak:{'9' * 400}GB", "is not a size"),
        (f"peak:+{'9' * 5000}%", "is not a size"),
        (f"step_time:{'9' * 400}s", "expected seconds, for example step_time:2.5s"),
        (f"{'peak' * 400}:1GB", "cannot limit"),
    ],
)
def test_a_limit_that_cannot_be_read_says_what_was_expected(limit, says):
    with pytest.raises(UsageError) as error:
        TraceLimit.parse(limit)
    assert says in str(error.value)
    assert len(str(error.value)) < 600


def test_a_growth_without_a_baseline_asks_for_one():
    with pytest.raises(UsageError, match=r"--baseline base\.npz"):
        holds("peak:+5%", trace(MIB))


@pytest.mark.parametrize("key", ["reserved", "device"])
def test_a_value_that_the_trace_lacks_cannot_be_limited(key):
    with pytest.raises(UsageError, match=f"has no value for {key} memory"):
        holds(f"{key}:1GB", trace(MIB))


def test_a_time_neither_measured_nor_estimated_cannot_be_limited():
    with pytest.raises(UsageError, match="has no value for step_time"):
        holds("step_time:1s", trace(MIB))
