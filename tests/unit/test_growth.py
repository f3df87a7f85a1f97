"""Memory that grows from step to step: what stays allocated, and fragmentation."""

import dataclasses

import pytest
import torch
from torch import nn
from traces import TraceBuilder

from memscope import Recorder, simulate
from memscope.allocator.other_settings import helpful_settings, other_settings
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.growth import about_steps, chosen_steps, growing, has_steps_to_compare, step_peaks
from memscope.simulation.device_memory import on_device
from memscope.simulation.devices.catalogue import get_device
from memscope.testing import toy_workload
from memscope.trace import Trace

BATCH, WIDTH = 64, 32


def trained(steps, kept=lambda step, loss, out: None, lengths=(BATCH,)):
    """A loop that hands its loss, one value for each output, to `kept`, which may store it."""
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for step in range(steps):
            out = model(torch.ones(lengths[step % len(lengths)], WIDTH))
            loss = out.square()
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            kept(step, loss, out)
    return recorder.trace()


def test_a_list_of_losses_is_named_with_the_bytes_that_each_step_leaves():
    history = []
    trace = trained(6, lambda step, loss, out: history.append(loss))
    (found,) = growing(trace)
    assert (found.category, found.module, found.op) == ("activation", "(model)", "aten.pow.Tensor_Scalar")
    assert found.steps == (0, 1, 2, 3, 4)  # that of step 5 may still be freed
    assert found.bytes_per_step == BATCH * WIDTH * 4
    assert has_steps_to_compare(trace)
    told = list(about_steps(trace))
    assert told[0] == (
        "memory grows from step to step: each of the steps 0 to 4 leaves 8.00 KiB allocated, activation of (model) "
        "(aten.pow.Tensor_Scalar)"
    )
    assert "loss.item()" in told[1]


@pytest.mark.parametrize(
    ("steps", "kept_steps"),
    [(4, {0, 1, 2}), (6, {0, 1, 2, 3, 5}), (6, {2, 3, 5}), (3, {0, 1, 2})],
    ids=["long enough", "stopped", "with a gap", "too few steps"],
)
def test_growth_is_three_steps_in_a_row_up_to_the_last_but_one(steps, kept_steps):
    history = []
    trace = trained(steps, lambda step, loss, out: history.append(loss) if step in kept_steps else None)
    expected = (0, 1, 2) if kept_steps == {0, 1, 2} and steps == 4 else None
    assert [found.steps for found in growing(trace)] == ([expected] if expected else [])


def test_what_is_freed_after_training_counts_as_left_behind_during_it():
    model, history = nn.Linear(WIDTH, WIDTH), []
    optimizer = torch.optim.AdamW(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for _ in range(5):
            history.append(model(torch.ones(BATCH, WIDTH)).square())
            history[-1].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        history.clear()  # as a function's own list when it returns
    assert [found.steps for found in growing(recorder.trace())] == [(0, 1, 2, 3)]


def test_steps_that_only_hold_the_previous_output_or_a_few_batches_do_not_grow():
    held = []

    def keep(step, loss, out):
        held.append(out)
        del held[:-2]

    assert growing(trained(10, keep)) == ()


@pytest.mark.parametrize(("weights", "is_told"), [(100_000, True), (1_000_000, False)])
def test_growth_is_told_if_a_thousand_steps_would_add_a_hundredth_of_the_peak(weights, is_told):
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", weights)
    for step in range(5):
        build.phase("forward", step)
        build.new("other", 4, module="loss")
    assert [found.bytes_per_step for found in growing(build.trace())] == ([4] if is_told else [])


def test_a_shipped_target_has_no_growth_and_equal_steps():
    trace = simulate(toy_workload, device="a100-40gb", steps=6)
    assert growing(trace) == ()
    assert not has_steps_to_compare(trace)
    assert list(about_steps(trace)) == []
    assert len({one.allocated_bytes for one in step_peaks(trace)[1:]}) == 1


def of_lengths(*mebibytes: int, capacity_bytes: int | None = None) -> Trace:
    """Steps that each allocate one activation of so many MiB, on a simulated GPU."""
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", 2**20)
    for step, size in enumerate(mebibytes):
        build.phase("forward", step)
        kept = build.new("activation", size * 2**20)
        build.phase("backward", step)
        build.free(kept)
    device = get_device("gpu")
    if capacity_bytes is not None:
        device = dataclasses.replace(device, capacity_bytes=capacity_bytes)
    trace = build.trace({"device": {"name": "gpu", "simulated": True}})
    return on_device(trace, device, AllocatorSettings())


def test_fragmentation_over_growing_batches_is_shown_as_it_builds_up():
    # A cached block is too small for the next batch, so each batch gets a segment of its own.
    trace = of_lengths(100, 200, 300, 400, 500)
    small = 2 * 2**20  # the segment of the weights
    peaks = step_peaks(trace)
    assert [one.reserved_bytes for one in peaks] == [small + mib * 2**20 for mib in (100, 300, 600, 1000, 1500)]
    assert [one.unused_bytes for one in peaks] == [2**20 + mib * 2**20 for mib in (0, 100, 300, 600, 1000)]
    # From step 1 to step 4, reserved memory grows by 1200 MiB, and the batch by 300 MiB.
    assert list(about_steps(trace)) == [
        "fragmentation builds up: reserved memory grows by 1.17 GiB from step 1 to step 4, the allocated peak by "
        "300.0 MiB"
    ]
    assert growing(trace) == ()


def test_the_setting_that_avoids_fragmentation_is_found_with_what_it_reserves():
    best, *_ = helpful_settings(of_lengths(100, 200, 300, 400, 500))
    assert best.text == "expandable_segments:True"
    # A page of 2 MiB for the weights; 25 pages of 20 MiB hold the largest batch, and the smaller ones.
    assert best.reserved_bytes == (2 + 500) * 2**20
    assert helpful_settings(of_lengths(500, 400, 300, 200, 100)) == ()  # each fits into the first batch's block


def test_reserved_memory_that_grows_with_what_is_kept_is_no_fragmentation():
    build = TraceBuilder()
    for step in range(5):
        build.phase("forward", step)
        build.new("other", 100 * 2**20)  # never freed: a segment each
    trace = on_device(
        build.trace({"device": {"name": "gpu", "simulated": True}}), get_device("gpu"), AllocatorSettings()
    )
    assert [one.reserved_bytes for one in step_peaks(trace)] == [100 * 2**20 * count for count in range(1, 6)]
    assert not any("fragmentation" in text for text in about_steps(trace))


def test_no_setting_is_named_where_none_saves_anything():
    build = TraceBuilder()
    build.phase("forward", 0)
    hole = build.new("activation", 100 * 2**20)
    build.new("activation", 15 * 2**20)
    build.free(hole)
    build.new("activation", 120 * 2**20)  # larger than the hole, which no setting moves
    trace = on_device(
        build.trace({"device": {"name": "gpu", "simulated": True}}), get_device("gpu"), AllocatorSettings()
    )
    assert trace.meta["peak_reserved"] > 1.5 * trace.peak.allocated_bytes
    assert helpful_settings(trace) == ()


def test_a_run_that_does_not_fit_is_helped_by_the_settings_with_which_it_fits():
    # Before it gives up, the allocator returns cached segments: only fragments inside segments in use can be the cause.
    assert of_lengths(100, 200, 300, capacity_bytes=310 * 2**20).meta["out_of_memory"] is None
    build = TraceBuilder()
    build.phase("forward", 0)
    first = build.new("activation", 60 * 2**20)
    build.free(first)
    build.new("activation", 15 * 2**20)  # takes a part of the first one's segment, which then cannot be returned
    build.phase("backward", 0)
    build.new("activation", 50 * 2**20)
    device = dataclasses.replace(get_device("gpu"), capacity_bytes=100 * 2**20)
    trace = build.trace({"device": {"name": "gpu", "simulated": True}})
    ran_out = on_device(trace, device, AllocatorSettings())
    assert ran_out.meta["out_of_memory"]
    (best, *_) = helpful_settings(ran_out)
    assert best.text == "expandable_segments:True"
    assert best.reserved_bytes == 80 * 2**20  # four pages of 20 MiB for 65 MiB


def test_both_kinds_of_settings_are_tried_beside_those_of_the_run():
    trace = of_lengths(100, 200, 300)
    splits = {f"max_split_size_mb:{size}" for size in (64, 128, 256, 512)}
    tried = other_settings(trace, AllocatorSettings(), None)
    assert {one.text for one in tried} == {"expandable_segments:True", *splits}
    assert [one.reserved_bytes for one in tried] == sorted(one.reserved_bytes for one in tried)
    kept = other_settings(trace, AllocatorSettings(max_split_size_bytes=128 * 2**20), None)
    assert {one.text for one in kept} == {"expandable_segments:True", *splits} - {"max_split_size_mb:128"}
    assert other_settings(trace, AllocatorSettings(expandable_segments=True), None) == ()


def test_few_of_many_steps_are_chosen_with_the_first_the_last_and_the_highest():
    shown, total = chosen_steps(of_lengths(*[10] * 23, 90, *[10] * 26))
    assert total == 50
    steps = [one.step for one in shown]
    assert {0, 23, 49} <= {*steps}
    assert len(steps) <= 8
