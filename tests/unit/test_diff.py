"""Changes between two traces."""

import pytest
from hypothesis import given
from traces import TraceBuilder, random_traces

from memscope.analysis.diff import Change, Setting, changed_settings, diff
from memscope.errors import UsageError
from memscope.trace import Trace

MIB = 2**20


def run(*layers: int, kept: bool = True, extra: int = 0, meta: dict | None = None) -> Trace:
    """A weight of 8 MiB; one activation per layer, freed in the backward pass or, if not kept, in the forward pass."""
    builder = TraceBuilder()
    builder.phase("setup")
    builder.new("parameter", 8 * MIB, module="layers.0.w")
    builder.phase("forward", 0)
    made = []
    for index, size in enumerate(layers):
        one = builder.new("activation" if kept else "temporary", size, module=f"layers.{index}.w", op="mm")
        if not kept:
            builder.free(one)
        made.append(one)
    if extra:
        builder.new("other", extra, module="head", op="add")
    builder.phase("backward", 0)
    builder.free(*(made if kept else []))
    return builder.trace({"target": "t"} | (meta or {}))


@given(random_traces())
def test_a_trace_does_not_differ_from_itself(trace):
    if trace.events:
        found = diff(trace, trace)
        assert not found
        assert found.peak.change == 0
        assert found.settings == ()


@given(random_traces(), random_traces())
def test_every_table_sums_to_the_difference_of_the_peaks(before, after):
    if before.events and after.events:
        found = diff(before, after)
        expected = after.peak.allocated_bytes - before.peak.allocated_bytes
        assert sum(change.change for change in found.categories.values()) == expected
        assert sum(change.change for change in found.modules.values()) == expected
        assert sum(change.change for change in found.allocations) == expected
        for step in found.steps:
            peaks = before.peak_of(step.step).allocated_bytes, after.peak_of(step.step).allocated_bytes
            assert (step.before, step.after) == peaks
            assert sum(change.change for change in step.categories.values()) == peaks[1] - peaks[0]


@given(random_traces(), random_traces())
def test_every_change_is_the_opposite_in_the_other_direction(before, after):
    if before.events and after.events:
        there, back = diff(before, after), diff(after, before)
        assert {n: -c.change for n, c in there.categories.items()} == {n: c.change for n, c in back.categories.items()}
        assert {n: -c.change for n, c in there.modules.items()} == {n: c.change for n, c in back.modules.items()}
        assert sorted(-c.change for c in there.allocations) == sorted(c.change for c in back.allocations)


def test_a_larger_activation_of_every_layer_is_one_change():
    found = diff(run(MIB, MIB), run(3 * MIB, 3 * MIB))
    assert found.peak == Change(10 * MIB, 14 * MIB)
    assert found.categories == {"activation": Change(2 * MIB, 6 * MIB)}
    assert found.modules == {"layers.*.w": Change(10 * MIB, 14 * MIB)}
    (change,) = found.allocations
    assert (change.kind, change.count, change.module, change.op, change.phase) == (
        "grew",
        2,
        "layers.*.w",
        "mm",
        "forward",
    )
    assert (change.before, change.after) == (2 * MIB, 6 * MIB)


def test_allocations_of_only_one_run_are_new_or_gone():
    without, with_head = run(MIB), run(MIB, extra=5 * MIB)
    assert [(c.kind, c.module, c.change) for c in diff(without, with_head).allocations] == [("new", "head", 5 * MIB)]
    assert [(c.kind, c.module, c.change) for c in diff(with_head, without).allocations] == [("gone", "head", -5 * MIB)]


def test_an_allocation_freed_before_the_peak_is_no_longer_alive():
    """If not kept, the first of two activations of 1 MiB is a temporary, alive at the peak without the second."""
    changes = diff(run(MIB, MIB), run(MIB, MIB, kept=False)).allocations
    assert [(c.kind, c.category, c.count, c.change) for c in changes] == [
        ("no longer alive", "activation", 2, -2 * MIB),
        ("now alive", "temporary", 1, MIB),
    ]


def test_equal_sizes_are_matched_before_the_order_of_birth():
    """Three births in one module. Without the first, the other two are unchanged and do not replace it."""

    def one(*sizes):
        builder = TraceBuilder()
        builder.phase("forward", 0)
        for size in sizes:
            builder.new("activation", size, module="m", op="mm")
        return builder.trace()

    (change,) = diff(one(10, 20, 30), one(20, 30)).allocations
    assert (change.kind, change.before, change.after, change.count) == ("gone", 10, 0, 1)


def test_an_allocation_freed_in_another_phase_has_another_lifetime():
    def one(phase):
        builder = TraceBuilder()
        builder.phase("forward", 0)
        made = builder.new("activation", MIB, module="m", op="mm")
        builder.phase(phase, 0)
        builder.free(made)
        return builder.trace()

    found = diff(one("backward"), one("zero_grad"))
    assert found.peak.change == 0
    (change,) = found.allocations
    assert (change.kind, change.freed_before, change.freed_after) == ("other lifetime", "backward", "zero_grad")


def test_differing_settings_are_given_as_the_reason():
    before = run(MIB, meta={"strategies": [], "settings": {"seq": 512, "batch": 8}, "versions": {"torch": "2.11"}})
    after = run(MIB, meta={"strategies": ["amp"], "settings": {"seq": 1024, "batch": 8}, "versions": {"torch": "2.13"}})
    assert set(map(repr, changed_settings(before, after))) == {
        repr(Setting("strategies", [], ["amp"])),
        repr(Setting("settings: seq", 512, 1024)),
        repr(Setting("versions: torch", "2.11", "2.13")),
    }


def test_traces_of_different_targets_are_compared_with_a_note():
    found = diff(run(MIB), run(2 * MIB, meta={"target": "u"}))
    assert not found.same_target
    assert found.peak.change == MIB


def test_an_empty_trace_cannot_be_compared():
    empty = TraceBuilder()
    empty.phase("setup")
    with pytest.raises(UsageError, match="empty"):
        diff(run(MIB), empty.trace())
