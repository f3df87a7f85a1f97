"""The allocator of a run: what it holds that nobody asked for, and its segments at the peak."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from traces import TraceBuilder, random_traces

from memscope.allocator.replay import replay
from memscope.allocator.settings import AllocatorSettings
from memscope.allocator.view import allocator_view
from memscope.dashboards.allocator import fragmentation, look, segments
from memscope.errors import UsageError
from memscope.simulation.device_memory import on_device
from memscope.simulation.devices.catalogue import Device, get_device
from memscope.trace import Trace

MIB = 2**20
DEFAULT = AllocatorSettings()
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def gpu(capacity_bytes: int | None = None) -> Device:
    return dataclasses.replace(get_device("gpu"), capacity_bytes=capacity_bytes, context_bytes=0)


def run() -> Trace:
    """Three blocks of 6 MiB in segments of 20 MiB: two of them fill one segment up to 12 MiB, with three it is 18; the
    middle one is freed, and the small pool holds 1,000 bytes in a block of 1,024."""
    built = TraceBuilder()
    built.phase("forward", 0)
    built.new("activation", 6 * MIB, module="a", op="aten.mm")
    middle = built.new("activation", 6 * MIB, module="a", op="aten.mm")
    built.new("gradient", 6 * MIB, module="b")
    built.free(middle)
    built.new("parameter", 30 * MIB, module="c")
    built.new("buffer", 1000, module="c")
    return on_device(built.trace({"device": {"name": "gpu", "simulated": True}}), gpu(), DEFAULT)


def curve(figure: go.Figure, name: str) -> Any:
    (found,) = (one for one in figure.data if one.name == name)
    return found


def test_bytes_that_no_tensor_requested_are_shown_apart() -> None:
    # At the peak, the last event: 12 + 30 MiB and 1,024 B of the 20 + 30 + 2 MiB reserved. All that is free shares its
    # segment with something alive. The block freed between two others has 6 MiB, the end of its segment 2 MiB.
    view = look(run())
    assert view is not None
    assert view.reserved[-1] == 52 * MIB
    assert (view.rounding[-1], view.cached[-1]) == (24, 10 * MIB - 1024)
    assert (view.unreleasable[-1], view.largest_free[-1]) == (10 * MIB - 1024, 6 * MIB)


def test_a_segment_without_allocated_blocks_counts_as_releasable() -> None:
    built = TraceBuilder()
    built.phase("forward", 0)
    built.new("parameter", 20 * MIB)
    built.free(built.new("activation", 20 * MIB))
    view = look(on_device(built.trace(), gpu(), DEFAULT))
    assert view is not None
    assert (view.cached[-1], view.unreleasable[-1]) == (20 * MIB, 0)


def test_fragmentation_is_drawn_in_mib() -> None:
    figure = fragmentation(run())
    assert curve(figure, "cached, not releasable").y[-1] == pytest.approx(10 - 1 / 1024)
    assert curve(figure, "cached, releasable").y.tolist() == [0] * 6
    assert curve(figure, "largest free block").y[-1] == 6


def test_a_segment_is_drawn_as_its_blocks_by_address() -> None:
    figure = segments(run())
    # The one with most that cannot be given back comes first: 6 MiB used, 6 free, 6 used, 2 free.
    assert figure.layout.yaxis.ticktext[0] == "20.0 MiB, 8.00 MiB free"
    pieces = sorted(
        (base, x, bars.name)
        for bars in figure.data
        for base, x, y in zip(bars.base, bars.x, bars.y, strict=True)
        if y == 0
    )
    assert pieces == [(0, 6, "activation"), (6, 6, "cached"), (12, 6, "gradient"), (18, 2, "cached")]
    assert "a · aten.mm" in curve(figure, "activation").customdata[0]


def test_full_segments_are_not_drawn() -> None:
    figure = segments(run())
    assert "parameter" not in {bars.name for bars in figure.data}


@settings(deadline=None, max_examples=40)
@given(trace=random_traces(), chosen=st.sampled_from([DEFAULT, EXPANDABLE]))
def test_the_view_equals_the_replay_at_every_event(trace: Trace, chosen: AllocatorSettings) -> None:
    assume(trace.events)
    given_blocks = on_device(trace, gpu(), chosen)
    view = allocator_view(given_blocks, range(trace.events))
    again = replay(trace.requested, trace.born, trace.freed, settings=chosen)
    snapshots = again.snapshots(range(trace.events))
    assert view is not None
    assert view.unreleasable is not None
    assert view.largest_free is not None
    assert view.unreleasable.tolist() == [snapshots[event].unreleasable_bytes for event in range(trace.events)]
    assert view.largest_free.tolist() == again.largest_free.tolist()
    assert view.cached.tolist() == [snapshots[event].free_bytes for event in range(trace.events)]
    peak = given_blocks.peak.event
    assert view.peak is not None
    assert view.peak.snapshot == snapshots[peak]
    owned = {again.addresses[row]: row for row in given_blocks.at(peak).tolist() if again.block_sizes[row]}
    assert dict(view.peak.owners) == owned


def test_a_nearly_full_device_releases_its_cache_with_a_note() -> None:
    # 30 MiB are cached when 34 are asked for. Of 60 the first are given back; an unlimited device would hold 64.
    built = TraceBuilder()
    built.phase("forward", 0)
    built.free(built.new("activation", 30 * MIB))
    built.new("parameter", 34 * MIB)
    trace = on_device(built.trace({"device": {"name": "gpu", "simulated": True}}), gpu(60 * MIB), DEFAULT)
    view = look(trace)
    assert view is not None
    assert (view.reserved[-1], view.unknown) == (34 * MIB, "")
    assert view.peak is not None
    assert [segment.size_bytes for segment in view.peak.snapshot.segments] == [34 * MIB]
    (note,) = trace.meta["notes"]
    assert note.startswith("the device was full in step 0, forward: the allocator released 30.0 MiB of its cache")


def test_a_run_that_does_not_fit_is_shown_without_a_limit() -> None:
    built = TraceBuilder()
    built.phase("forward", 0)
    built.new("parameter", 40 * MIB)
    built.new("parameter", 40 * MIB)
    trace = on_device(built.trace({"device": {"name": "gpu", "simulated": True}}), gpu(60 * MIB), DEFAULT)
    assert trace.meta["out_of_memory"]["event"] == 1
    view = look(trace)
    assert view is not None
    assert (view.reserved[-1], view.unknown) == (80 * MIB, "")


def measured() -> Trace:
    trace = run()
    return dataclasses.replace(trace, meta={"device": {"name": "A100", "simulated": False}})


def test_a_measured_run_shows_sums_without_segments() -> None:
    view = look(measured())
    assert view is not None
    assert (view.peak, view.unreleasable, view.cached[-1]) == (None, None, 10 * MIB - 1024)
    names = [one.name for one in fragmentation(measured()).data]
    assert names == ["block rounding", "cached"]
    with pytest.raises(UsageError, match="cannot be drawn: the trace of a measured run has no addresses"):
        segments(measured())


def test_a_simulated_run_without_allocator_settings_is_not_called_measured() -> None:
    trace = run()
    for meta, reason in (
        ({"device": {"name": "gpu", "simulated": True}}, "has no allocator settings"),
        ({}, "has neither addresses nor allocator settings"),
    ):
        view = look(dataclasses.replace(trace, meta=meta))
        assert view is not None
        assert reason in view.unknown


def test_reserved_memory_that_contradicts_the_settings_shows_no_segments() -> None:
    trace = dataclasses.replace(run(), reserved=run().reserved + 2 * MIB)
    view = look(trace)
    assert view is not None
    assert view.unknown == "a replay reserves other memory than this trace, so its segments are not known"


def test_a_run_on_the_cpu_has_no_allocator_view() -> None:
    trace = dataclasses.replace(run(), reserved=np.zeros(0, dtype=np.int64))
    assert look(trace) is None
    with pytest.raises(UsageError, match="had no allocator"):
        fragmentation(trace)


@pytest.mark.parametrize(
    ("changed", "unknown"),
    [
        ({"of_a_later_version": 7}, ""),
        ({"large_segment_size_bytes": MIB}, "allocator setting large_segment_size_mb:1: expected more than 10"),
        ({"roundup_power2_divisions": [3]}, "allocator setting roundup_power2_divisions"),
    ],
)
def test_settings_in_a_trace_may_be_of_a_later_version_or_unusable(changed: dict[str, Any], unknown: str) -> None:
    meta = run().meta
    allocator = meta["allocator"] | {"settings": meta["allocator"]["settings"] | changed}
    view = look(dataclasses.replace(run(), meta={**meta, "allocator": allocator}))
    assert view is not None
    assert view.unknown.startswith(unknown)
    assert (view.peak is None) == bool(view.unknown) == bool(unknown)
